//! Sizes of the maps and bounds of loops.

/// Publishes at once; element 0 of `PUBLISHES` stays empty.
pub const PUBLISHES: u32 = 65_536;
/// Published ports on specific addresses.
pub const FRONTENDS: u32 = 131_072;
/// Sockets that hold a wide range, one for each family.
pub const SOCKETS: u32 = 1024;
/// Addresses of backends.
pub const BACKENDS: u32 = 65_536;
/// Addresses of this host and of containers, prefixes that lead to container networks, and exceptions from them.
pub const LOCATIONS: u32 = 131_072;
/// Devices.
pub const INTERFACES: u32 = 16_384;
/// Flows at once. Entries are allocated as they are needed.
pub const FLOWS: u32 = 1_048_576;
/// Flows that have begun and are not proven; the oldest is forgotten for a new one.
pub const HALF_OPEN: u32 = 65_536;
/// Hashes of original tuples in `TRIES`.
pub const TRIES: u32 = 65_536;
/// Prefixes of all allow-lists.
pub const ALLOW: u32 = 65_536;
/// Source ports tried for a new SNAT flow before it is refused: where 15 of 16 are taken, one of 4,000 flows is.
pub const SNAT_TRIES: u32 = 128;
/// Answers of the routing table that each CPU keeps for a tick: a power of two.
pub const ROUTES: u32 = 512;
/// Datagrams of which fragments are expected; the oldest is forgotten for a new one.
pub const FRAGMENTS: u32 = 4096;
