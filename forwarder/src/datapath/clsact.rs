//! tc filters, on kernels without TCX links: which are this instance's, how they are taken away, and the
//! qdisc with them if it was made for them. Nobody else's are touched. Attaching is in `datapath.rs`.
//!
//! A filter stays when its process ends, as a pinned link does. The instance's name is in its handle, so that
//! it is found again. Netlink is spoken without waiting for a runtime: `down` has none, and the last thing that
//! `run` does is to take its filters away.

use std::{io, ops::ControlFlow};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption},
};

use crate::network::netlink::Socket;

/// ETH_P_ALL as `tcm_info` has it (include/uapi/linux/if_ether.h).
const EVERY_PROTOCOL: u32 = 0x0003_u16.to_be() as u32;

/// A side of the qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Ingress,
    Egress,
}

impl Side {
    /// As `tc` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn handle(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// One of our filters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub ifindex: u32,
    side: Side,
    pub priority: u16,
    handle: TcHandle,
}

/// The handle of an instance's filters (FNV-1a of its name; 0 would ask the kernel for any).
pub fn handle(instance: &str) -> u32 {
    let hash = instance.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    hash.max(1)
}

/// The filter with that handle that runs one of `programs` on a device of this network namespace.
///
/// # Errors
/// Netlink is not to be had.
pub fn find(
    ifindex: u32,
    side: Side,
    handle: u32,
    programs: &[&str],
) -> io::Result<Option<Filter>> {
    let there = filters(ifindex, side)?;
    let ours = there.into_iter().flatten().find(|message| {
        message.header.handle == handle.into()
            && name(message).is_some_and(|name| programs.contains(&name))
    });
    Ok(ours.map(|message| Filter {
        ifindex,
        side,
        priority: (message.header.info >> 16) as u16,
        handle: message.header.handle,
    }))
}

/// The same, on all devices.
///
/// # Errors
/// As [`find`].
pub fn find_all(side: Side, handle: u32, programs: &[&str]) -> io::Result<Vec<Filter>> {
    let mut all = Vec::new();
    for device in &nix::net::if_::if_nameindex()? {
        all.extend(find(device.index(), side, handle, programs)?);
    }
    Ok(all)
}

/// Whether there are filters on a device that run none of `programs`.
///
/// # Errors
/// As [`find`].
pub fn has_others(ifindex: u32, side: Side, programs: &[&str]) -> io::Result<bool> {
    let there = filters(ifindex, side)?;
    Ok(there.iter().any(|message| match message {
        // Each priority is told as a filter without a handle first.
        Some(message) if message.header.handle == 0.into() => false,
        Some(message) => !name(message).is_some_and(|name| programs.contains(&name)),
        None => true,
    }))
}

/// The priority to attach at: before everybody else's filters, as TCX links are. Filters of another kind
/// cannot share theirs.
///
/// # Errors
/// As [`find`].
pub fn priority(ifindex: u32, side: Side) -> io::Result<u16> {
    let there = filters(ifindex, side)?;
    let taken = |priority: &u16| {
        there.iter().flatten().any(|message| {
            let bpf = TcAttribute::Kind(TcFilterBpf::KIND.to_owned());
            (message.header.info >> 16) as u16 == *priority && !message.attributes.contains(&bpf)
        })
    };
    let free = (1..u16::MAX).find(|priority| !taken(priority));
    free.ok_or_else(|| io::Error::other("no free priority"))
}

/// # Errors
/// It has gone.
pub fn remove(filter: &Filter) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header = TcHeader {
        index: filter.ifindex.cast_signed(),
        handle: filter.handle,
        parent: filter.side.handle(),
        info: u32::from(filter.priority) << 16 | EVERY_PROTOCOL,
        ..TcHeader::default()
    };
    ask(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK).map(drop)
}

/// Removes the qdisc unless there are filters on it, in either direction.
///
/// # Errors
/// It has gone, or netlink is not to be had.
pub fn remove_idle_qdisc(ifindex: u32) -> io::Result<()> {
    for side in [Side::Ingress, Side::Egress] {
        if !filters(ifindex, side)?.is_empty() {
            return Ok(());
        }
    }
    let mut message = TcMessage::default();
    message.header = TcHeader {
        index: ifindex.cast_signed(),
        handle: 0xffff_0000.into(),
        parent: TcHandle::CLSACT,
        ..TcHeader::default()
    };
    ask(RouteNetlinkMessage::DelQueueDiscipline(message), NLM_F_ACK).map(drop)
}

/// What is on one side of the qdisc; `None` is a filter that is none of ours in any case.
fn filters(ifindex: u32, side: Side) -> io::Result<Vec<Option<TcMessage>>> {
    let mut message = TcMessage::default();
    message.header = TcHeader {
        index: ifindex.cast_signed(),
        parent: side.handle(),
        ..TcHeader::default()
    };
    match ask(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP) {
        // No qdisc, or no such device any more.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {
            Ok(Vec::new())
        }
        other => other,
    }
}

/// The program's name as the filter has it.
fn name(message: &TcMessage) -> Option<&str> {
    let options = message
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.as_str()),
        _ => None,
    })
}

/// One request and its answers; those that cannot be read are `None`.
fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<Option<TcMessage>>> {
    let mut answers = Vec::new();
    Socket::open()?.ask(request, flags, |answer| {
        match answer {
            Some(RouteNetlinkMessage::NewTrafficFilter(filter)) => answers.push(Some(filter)),
            Some(_) => {}
            None => answers.push(None),
        }
        ControlFlow::Continue(())
    })?;
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_have_handles_of_their_own() {
        assert_ne!(handle("default"), handle("other"));
        assert_ne!(handle("default"), 0);
        // A later version must find what this one left.
        assert_eq!(handle("default"), 0x933b_5bde);
    }
}
