//! Sizes of the maps and bounds of loops.

/// Publishes at once; element 0 of `PUBLISHES` stays empty.
pub const PUBLISHES: u32 = 65_536;
/// Publishes that may drain on one port, beside the one that has it.
pub const DRAINING: usize = 16;
/// Published ports on specific addresses.
pub const FRONTENDS: u32 = 131_072;
/// Sockets that hold a wide range, one for each family.
pub const SOCKETS: u32 = 1024;
/// Addresses of backends.
pub const BACKENDS: u32 = 65_536;
/// Addresses of this host and of containers, prefixes that lead to container networks, and exceptions from them.
pub const LOCATIONS: u32 = 131_072;
/// Routes by devices with routes that have an MTU of their own.
pub const ROUTE_MTUS: u32 = 32_768;
/// Devices.
pub const INTERFACES: u32 = 16_384;
/// Flows at once. Entries are allocated as they are needed.
pub const FLOWS: u32 = 1_048_576;
/// Flows that have begun and are not proven; the oldest is forgotten for a new one.
pub const HALF_OPEN: u32 = 65_536;
/// Sources whose entries among the flows are counted apart, but for chance: a power of two.
pub const SHARES: u32 = 16_384;
/// Prefixes of all allow-lists.
pub const ALLOW: u32 = 65_536;
/// Counters of what publishes have refused, one for each publish and reason. Entries are made as they are needed.
pub const REFUSED: u32 = 65_536;
/// Addresses that are banned. Entries are allocated as they are needed, 16 MiB for the table itself at once.
pub const BANNED: u32 = 1_000_000;
/// Networks that are banned.
pub const BANNED_NETWORKS: u32 = 131_072;
/// Sources whose new flows are counted, each for a publish; the oldest is forgotten for a new one.
pub const SOURCES: u32 = 32_768;
/// Source ports tried for a new SNAT flow before it is left to the slow path: where 19 of 20 are taken, one of 700 flows is.
pub const SNAT_TRIES: u32 = 128;
/// So many are tried before one whose flow is over is taken.
pub const SNAT_FREE_TRIES: u32 = 8;
/// Ports that are tried because a socket of this host has those before.
pub const SNAT_SOCKETS: u32 = 4;
/// Flows' places that are changing hands.
pub const CLAIMS: u32 = 1024;
/// Answers of the routing table that each CPU keeps for a tick: a power of two.
pub const ROUTES: u32 = 512;
/// Groups of senders that are told of an MTU apart from each other: a power of two.
pub const TOLD_GROUPS: u32 = 256;
/// Connections of others to backends' ports of which the SYN was seen.
pub const DIRECT: u32 = 16_384;
/// Conversations of masqueraded containers, with a published port's number as the source; the oldest is forgotten.
pub const LEFT: u32 = 32_768;
/// Datagrams of which fragments are expected; the oldest is forgotten for a new one.
pub const FRAGMENTS: u32 = 16_384;
