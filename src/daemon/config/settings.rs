//! From the words of flead.toml to what the daemon goes by: names become numbers, `auto` becomes a figure.

use nix::unistd::{Group, User};
use std::time::Duration;

use super::{Config, HugePages, Loaded, Mistake, invalid};
use crate::daemon::Settings;
use crate::error::{Error, Result};

impl Loaded {
    /// The configuration as the daemon takes it. Users and groups are looked up here, so a group's members are those of
    /// this moment; a reload looks again.
    ///
    /// # Errors
    /// `Invalid` for a user or group that this machine does not have, with its place and remedy.
    pub fn settings(&self) -> Result<Settings> {
        let config = &self.config;
        let mut users = self.users("users", &config.users)?;
        let (groups, members) = self.groups("groups", &config.groups)?;
        users.extend(members);
        let mut settings = plain(config);
        settings.users = users;
        settings.groups = groups;
        settings.admins = self.users("admins", &config.admins)?;
        Ok(settings)
    }

    fn users(&self, key: &str, names: &[String]) -> Result<Vec<u32>> {
        names
            .iter()
            .map(|name| match name.parse() {
                Ok(number) => Ok(number),
                Err(_) => match User::from_name(name) {
                    Ok(Some(user)) => Ok(user.uid.as_raw()),
                    Ok(None) => Err(self.unknown(key, "user", name)),
                    Err(errno) => Err(Error::os(errno as i32, format!("look up user {name}"))),
                },
            })
            .collect()
    }

    /// The groups' numbers, and the users that are members of them besides their own group: the kernel tells only that one.
    fn groups(&self, key: &str, names: &[String]) -> Result<(Vec<u32>, Vec<u32>)> {
        let (mut numbers, mut members) = (Vec::new(), Vec::new());
        for name in names {
            let found = match name.parse::<u32>() {
                Ok(number) => {
                    numbers.push(number);
                    Group::from_gid(number.into())
                }
                Err(_) => Group::from_name(name),
            };
            let group =
                found.map_err(|errno| Error::os(errno as i32, format!("look up group {name}")))?;
            match group {
                Some(group) => {
                    numbers.push(group.gid.as_raw());
                    // A member that has left the machine is no mistake of this file.
                    let known = group
                        .mem
                        .iter()
                        .filter_map(|name| User::from_name(name).ok()?);
                    members.extend(known.map(|user| user.uid.as_raw()));
                }
                None if name.parse::<u32>().is_ok() => {}
                None => return Err(self.unknown(key, "group", name)),
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        Ok((numbers, members))
    }

    fn unknown(&self, key: &str, what: &str, name: &str) -> Error {
        let mistake = Mistake {
            key: key.to_owned(),
            problem: format!("there is no {what} '{name}' on this machine"),
            remedy: format!("create it (systemd-sysusers, {what}add) or name another"),
        };
        invalid(&self.origin(key), &mistake)
    }
}

/// Everything but users and groups.
fn plain(config: &Config) -> Settings {
    let defaults = Settings::default();
    Settings {
        socket: config.socket.clone(),
        socket_mode: config.socket_mode,
        models: config.models.clone(),
        memory: config.memory,
        slots_count: match config.slots {
            0 => defaults.slots_count,
            count => count as u32,
        },
        reader: config.reader,
        depth: config.depth as u32,
        request_bytes: config.request_bytes as u32,
        numa: config.numa,
        require_huge_pages: config.huge_pages == HugePages::Require,
        page_bytes: (config.page_bytes != 0).then_some(config.page_bytes),
        lease_timeout: Duration::from_nanos(config.limits.lease_timeout_ns),
        connections_max: config.limits.clients as usize,
        connections_per_user_max: config.limits.clients_per_user as usize,
        models_max: config.limits.models as usize,
        leases_max: config.limits.leases,
        packet_bytes_max: config.limits.packet_bytes as usize,
        requests_per_second: config.limits.requests_per_second,
        weights: config
            .weights
            .iter()
            .map(|(model, weight)| (model.into(), *weight))
            .collect(),
        preload: config.preload.clone(),
        metrics_listen: config.metrics_listen,
        pressure: config.pressure.watch,
        ..defaults
    }
}
