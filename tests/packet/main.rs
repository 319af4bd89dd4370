//! Tier 1: packets through the loaded programs.
