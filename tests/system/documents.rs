//! The commands of README.md and docs/, each run as it stands there.
