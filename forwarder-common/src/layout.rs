//! How keys and values of maps that outlive a process are laid out: by its fields' names a later version finds in an
//! earlier one's tables what it knows.
//!
//! A field that comes to mean something else gets another name. A new one starts at zero where flows are carried over.

/// A part of a key or value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    /// Octets in front of it.
    pub offset: usize,
    /// Octets.
    pub size: usize,
}

/// A type of keys or values of which every octet belongs to a field.
pub trait Layout {
    const FIELDS: &'static [Field];
}

/// The size of the field that a function leads to.
pub const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Whether the fields are all there is to a type of this size.
pub const fn is_whole(fields: &[Field], size: usize) -> bool {
    let mut sum = 0;
    let mut at = 0;
    while at < fields.len() {
        sum += fields[at].size;
        at += 1;
    }
    sum == size
}

/// Implements [`Layout`] for a struct; one that is forgotten is a compile error.
macro_rules! layout {
    ($type:ident: $($($field:ident).+),* $(,)?) => {
        impl $crate::layout::Layout for $type {
            const FIELDS: &'static [$crate::layout::Field] = &[$($crate::layout::Field {
                name: stringify!($($field).+),
                offset: core::mem::offset_of!($type, $($field).+),
                size: $crate::layout::size_of_field(|it: &$type| &it.$($field).+),
            }),*];
        }

        const _: () = assert!($crate::layout::is_whole(
            <$type as $crate::layout::Layout>::FIELDS,
            size_of::<$type>(),
        ));
    };
}
pub(crate) use layout;

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Layout for $type {
            const FIELDS: &'static [Field] = &[Field {
                name: "value",
                offset: 0,
                size: size_of::<$type>(),
            }];
        }
    )*};
}
plain!(u32, u64, [u64; 5]);
