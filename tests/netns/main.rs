//! Tier 2: real sockets in network namespaces, through the daemon as a user starts it.
//!
//! `matrix` has every kind of client, `firewall` what a firewall does meanwhile, `flood` what a flood does, `forged` what
//! says it comes from somebody else, `cut` who hears that a publish is no more, `lifecycle` what comes and goes, `metrics`
//! what is counted, `names` what documents call it, `places` many clients of the control socket, `top` a terminal, `moved` clients that get another MAC or link, `filters`
//! other people's tc filters, `shaping` their limits, `ipsec` their policies, `rules` their routes, `followed` what
//! is known of the network after any changes, `promises` what must not
//! be reachable, `timeout` when a flow ends, `fragment` datagrams in parts, `direct` connections past the published port,
//! `privilege` what an instance may do, `scale` as many flows as there may be, `coalesced` datagrams that come in one buffer,
//! `crowd` as many connections of this host as there are source ports, `selftests` the scenarios of the kernel's own tests,
//! `starved` who takes what others need, `lasting` what must not grow with time, `twins` what both paths do alike, and `usage` what a mistake is answered with. Every
//! test makes its own machine (`scene` has the usual one), so they run side by side.

mod api;
mod bulk;
mod cni;
mod coalesced;
mod crowd;
mod cut;
mod differential;
mod direct;
mod docker_proxy;
mod doctor;
mod engine;
mod fallback;
mod filters;
mod firewall;
mod flood;
mod flows;
mod followed;
mod forged;
mod fragment;
mod handover;
mod healing;
mod icmp;
mod instance;
mod ipsec;
mod lasting;
mod left;
mod lifecycle;
mod machine;
mod matrix;
mod metrics;
mod moved;
mod names;
mod places;
mod policy;
mod privilege;
mod promises;
mod range;
mod remote;
mod respect;
mod restart;
mod restricted;
mod rules;
mod scale;
mod scene;
mod sctp;
mod selftests;
mod shaping;
mod starved;
mod tagged;
mod timeout;
mod top;
mod topology;
mod trace;
mod twins;
mod usage;
mod vlan;
mod ways;
mod worlds;
