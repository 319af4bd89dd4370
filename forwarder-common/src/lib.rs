//! What the kernel program and user space share: the types of the maps' keys and values, the
//! numbered reasons, and arithmetic without IO. No `std`, no policy.
//!
//! Every map type is `#[repr(C)]` and `bytemuck::Pod`, so that a hole between fields is a compile
//! error. Addresses and ports are in wire order (big endian) unless a name says otherwise.
#![no_std]

pub mod checksum;
pub mod flow;
pub mod handover;
pub mod layout;
pub mod limits;
pub mod policy;
pub mod publish;
pub mod reason;
pub mod share;
pub mod tcp;
pub mod tuple;
pub mod usage;
