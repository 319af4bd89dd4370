//! Tier 3: forwarder as a person meets it, with whole programs of others: a browser that opens the demonstration, the
//! commands of the documents as a shell reads them, a package that is installed and removed, container engines.
//!
//! Takes more programs and more time than the other tiers, so `cargo xtask test` runs it only with `--tier 3`.

mod cni;
mod crowdsec;
mod docker;
mod documents;
mod fail2ban;
mod package;
mod page;
mod status;
