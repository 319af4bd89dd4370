//! Why the fast path does not serve a publish: a name that does not change, and words for people.

use std::net::IpAddr;

/// The reason, of which the first that holds is given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    #[error("--datapath userland")]
    Userland,
    /// No eBPF here, with the kernel's or the loader's words.
    #[error("{0}")]
    NoDatapath(String),
    #[error("SCTP is served in user space")]
    Sctp,
    #[error("link-local addresses are served in user space")]
    LinkLocal,
    #[error("clients and backend of different families meet in user space")]
    OtherFamily,
    #[error("the PROXY protocol is spoken in user space")]
    ProxyProtocol,
    #[error("the backend is this host")]
    ThisHost,
    #[error("no route to {0}")]
    NoRoute(IpAddr),
    #[error("no device for the route to {0}")]
    NoDevice(IpAddr),
    #[error("no address of this host to reach {0} from")]
    NoSource(IpAddr),
    #[error("{0} has an unsupported link header")]
    LinkHeader(String),
    #[error("an IPsec policy covers it: {0}")]
    Ipsec(String),
    /// Its priority.
    #[error("rule {0} of `ip rule` chooses the way by protocol or ports")]
    Rule(u32),
    /// New connections would be translated in one direction alone, or by chance.
    #[error("our program cannot be attached to {0}")]
    Detached(String),
    /// With the words of what failed.
    #[error("{0}")]
    Refused(String),
    #[error("--respect-firewall: the backend is on another machine")]
    FirewallRemote,
    #[error("--respect-firewall: the host does not forward; `sysctl {0}=1` would change that")]
    FirewallForwarding(&'static str),
    /// Neither path serves it: its ports cannot be had, with the words for that.
    #[error("not served: {0}")]
    Waiting(String),
}

impl Unserved {
    /// As `reason_code` in `list --json`.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Userland => "userland",
            Self::NoDatapath(_) => "no_datapath",
            Self::Sctp => "sctp",
            Self::LinkLocal => "link_local",
            Self::OtherFamily => "other_family",
            Self::ProxyProtocol => "proxy_protocol",
            Self::ThisHost => "this_host",
            Self::NoRoute(_) => "no_route",
            Self::NoDevice(_) => "no_device",
            Self::NoSource(_) => "no_source",
            Self::LinkHeader(_) => "link_header",
            Self::Ipsec(_) => "ipsec",
            Self::Rule(_) => "rule",
            Self::Detached(_) => "detached",
            Self::Refused(_) => "refused",
            Self::FirewallRemote => "firewall_remote",
            Self::FirewallForwarding(_) => "firewall_forwarding",
            Self::Waiting(_) => "waiting",
        }
    }
}
