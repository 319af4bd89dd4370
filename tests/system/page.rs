//! The demonstration's page in a real browser.
