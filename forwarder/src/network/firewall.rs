//! Who bans by the host's firewall: fail2ban, CrowdSec and ufw, known by the names of their chains. Packets of published ports
//! do not meet them. Nothing else is read of the rules.

#![expect(unsafe_code, reason = "a buffer that the kernel fills")]

use std::{collections::BTreeSet, fs, io, os::fd::AsRawFd as _};

use netlink_packet_core::NlasIterator;
use netlink_sys::protocols::NETLINK_NETFILTER;
use socket2::{Domain, Protocol, Type};

use super::dump::dump;

// include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h: the subsystem and the command make a message's type.
const NFT_MSG_GETCHAIN: u16 = 10 << 8 | 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
/// The length of `struct nfgenmsg`, all zero: every family.
const FAMILY_LENGTH: usize = 4;
// include/uapi/linux/netfilter_ipv4/ip_tables.h
const IPT_SO_GET_INFO: libc::c_int = 64;
const IPT_SO_GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_getinfo`, which ends with the octets that the rules take, and `struct ipt_get_entries`, which they follow.
const INFO_LENGTH: usize = 84;
const ENTRIES_LENGTH: usize = 40;

/// How the names of their chains and tables begin.
const NAMES: [(&str, &str); 4] = [
    ("f2b-", "fail2ban"),
    ("crowdsec", "CrowdSec"),
    ("CROWDSEC", "CrowdSec"),
    ("ufw-", "ufw"),
];

/// Those that have chains, in nftables and what writes to it, or in the older tables of iptables.
///
/// # Errors
/// This process may not read them.
pub fn banning() -> io::Result<BTreeSet<&'static str>> {
    let mut found = BTreeSet::new();
    for name in chains()? {
        let known = NAMES.iter().filter(|(begin, _)| name.starts_with(begin));
        found.extend(known.map(|(_, who)| who));
    }
    // Asking for a table makes it.
    let tables = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if tables.lines().any(|table| table == "filter") {
        let rules = legacy_rules()?;
        let has = |name: &str| rules.windows(name.len()).any(|it| it == name.as_bytes());
        let known = NAMES.iter().filter(|(begin, _)| has(begin));
        found.extend(known.map(|(_, who)| who));
    }
    Ok(found)
}

/// Names of nftables' chains, and of their tables.
fn chains() -> io::Result<Vec<String>> {
    dump(
        NETLINK_NETFILTER,
        NFT_MSG_GETCHAIN,
        &[0; FAMILY_LENGTH],
        named,
    )
}

fn named(chain: &[u8]) -> Vec<String> {
    let attributes = chain.get(FAMILY_LENGTH..).unwrap_or_default();
    let names = NlasIterator::new(attributes)
        .flatten()
        .filter(|it| [NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME].contains(&it.kind()));
    let names = names.map(|it| {
        String::from_utf8_lossy(it.value())
            .trim_end_matches('\0')
            .into()
    });
    names.collect()
}

/// The table `filter` of iptables, as it is in the kernel: names of chains stand in it in full.
fn legacy_rules() -> io::Result<Vec<u8>> {
    let socket = socket2::Socket::new(
        Domain::IPV4,
        Type::RAW,
        Some(Protocol::from(libc::IPPROTO_RAW)),
    )?;
    let ask = |option, answer: &mut [u8]| {
        answer[..6].copy_from_slice(b"filter");
        let mut length = answer.len() as libc::socklen_t;
        // SAFETY: the kernel writes no more than `length` octets, which the buffer has.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_IP,
                option,
                answer.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    let mut info = [0; INFO_LENGTH];
    ask(IPT_SO_GET_INFO, &mut info)?;
    let size = info.last_chunk().copied().unwrap_or_default();
    let mut rules = vec![0; ENTRIES_LENGTH + u32::from_ne_bytes(size) as usize];
    rules[32..36].copy_from_slice(&size); // behind the table's name
    ask(IPT_SO_GET_ENTRIES, &mut rules)?;
    Ok(rules)
}
