//! What is published: wanted by whom, from where to where, under which policy. Nothing here asks the machine.

pub mod spec;
