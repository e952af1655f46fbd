//! Which NUMA node a model's memory and thread belong on: the one its drive hangs on.
//!
//! Machines with one node are recognised from one small file in /sys, so that they never pay for a full topology.

use super::stats::{Fallback, FallbackKind};
use crate::error::{Error, Result};
use crate::io::ShardFile;
use crate::mem::{Binding, Topology};
use std::sync::Arc;

/// The node for the model's first shard, and why there is none where one was wanted.
pub fn of_drive(file: &ShardFile) -> (Option<Binding>, Option<Fallback>) {
    let online = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    if !online.contains(['-', ',']) {
        return (None, None);
    }
    let found = Topology::detect()
        .and_then(|topology| Ok((topology.node_of_file(&opened(file)?)?, topology)));
    match found {
        Ok((Some(node_index), topology)) => (
            Some(Binding {
                topology: Arc::new(topology),
                node_index,
            }),
            None,
        ),
        Ok((None, _)) => (
            None,
            not_bound("the system does not say which node the drive hangs on".to_owned()),
        ),
        Err(error) => (None, not_bound(error.to_string())),
    }
}

fn not_bound(reason: String) -> Option<Fallback> {
    Some(Fallback {
        kind: FallbackKind::Numa,
        reason,
    })
}

fn opened(file: &ShardFile) -> Result<std::fs::File> {
    std::fs::File::open(file.path())
        .map_err(|error| Error::from_io(&error, format_args!("open {}", file.path().display())))
}
