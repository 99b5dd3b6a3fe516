//! The part of a policy that says where the lock table is.

mod etcd;

use std::sync::Arc;
use std::time::Duration;

use super::Reentrancy;
use super::api;
use super::reader::{Object, PolicyError, Reader, hint, list, quote};

pub use etcd::{Access, Etcd};

/// How long an authority has to answer, its waiting aside, where the policy does not say.
const TIMEOUT: Duration = Duration::from_millis(250);

/// The shortest timeout: below it a busy machine would look like an authority that is away.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);

/// The longest timeout.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the lock table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In this Envoy's shared data.
    Local,
    /// At another Envoy, which serves the lease API.
    Authority(Arc<Authority>),
    /// Keys in etcd.
    Etcd(Arc<Etcd>),
}

/// An authority, as a proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// The cluster that it is reached by.
    pub cluster: String,
    /// The prefix of its API; no slash at its end.
    pub prefix: String,
    /// How long it has to answer, its waiting aside.
    pub timeout: Duration,
}

pub(super) fn backend(at: &Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Result<Backend, PolicyError> {
    let words = ["local", "authority", "etcd", "redis"];
    let entries = at.entries()?;
    for (name, place) in &entries {
        if !words.contains(name) {
            let hint = hint(name, words, || format!("; use {}", list(&words)));
            return Err(place.error(format!("{} is not a backend{hint}", quote(name))));
        }
    }
    match entries.as_slice() {
        [("local", place)] => place.object(&[]).map(|_| Backend::Local),
        [("authority", place)] => authority(place).map(|authority| Backend::Authority(Arc::new(authority))),
        [("etcd", place)] => etcd::etcd(place, env).map(|etcd| Backend::Etcd(Arc::new(etcd))),
        [(_, place)] => Err(place.error("this build has no such backend yet; use local, authority or etcd")),
        [] => Err(at.error("names no backend; write { local: {} }")),
        [_, _, ..] => Err(at.error("names several backends; keep one of them")),
    }
}

fn authority(at: &Reader<'_>) -> Result<Authority, PolicyError> {
    let object = at.object(&["cluster", "prefix", "timeout"])?;
    let cluster = object.require("cluster")?;
    let name = cluster.text()?;
    // It stands in a header of every call too.
    if name.is_empty() || name.len() > 256 || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        let problem = "is no name of a cluster; write that of the cluster in Envoy's configuration, such as \"interlock-authority\"";
        return Err(cluster.error(problem));
    }
    let timeout = object.read("timeout", |at| {
        let timeout = at.duration()?;
        if (SHORTEST_TIMEOUT..=LONGEST_TIMEOUT).contains(&timeout) {
            return Ok(timeout);
        }
        Err(at.error("is no timeout for an authority; write \"10ms\" to \"30s\""))
    })?;
    Ok(Authority {
        cluster: name.to_owned(),
        prefix: object.read("prefix", api::prefix)?.unwrap_or_else(|| api::PREFIX.to_owned()),
        timeout: timeout.unwrap_or(TIMEOUT),
    })
}

/// Which requests re-enter is decided where the table is.
pub(super) fn check_reentrancy(
    object: &Object<'_>,
    backend: &Backend,
    reentrancy: Reentrancy,
) -> Result<(), PolicyError> {
    if matches!(backend, Backend::Etcd(_)) && reentrancy == Reentrancy::Lease {
        return Err(
            object.error_at("reentrancy", "\"lease\" is for the local backend only; write \"owner\" or \"none\"")
        );
    }
    if matches!(backend, Backend::Authority(_)) && reentrancy != Reentrancy::Owner {
        let problem = "is decided by the authority; leave the field out here and write it into the authority's policy \
                       (\"lease\" is for the local backend only)";
        return Err(object.error_at("reentrancy", problem));
    }
    Ok(())
}
