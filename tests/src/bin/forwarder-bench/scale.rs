//! Many publishes, wide ranges, many flows: time, memory, and what they cost each packet.

use anyhow::Result;
use serde::Serialize;

use crate::arena::Programs;

#[derive(Debug, Default, Serialize)]
pub(crate) struct Scale {}

impl Scale {
    pub(crate) fn measure(_programs: &Programs, _notes: &mut Vec<String>) -> Result<Self> {
        Ok(Self::default())
    }

    pub(crate) fn markdown(&self) -> String {
        String::new()
    }
}
