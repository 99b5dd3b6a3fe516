//! The filter as a whole, over a fake proxy with a virtual clock: what callers and upstreams see of it, whatever fails.

mod annotate;
mod asked;
mod authority;
mod budget;
mod calls;
mod faults;
mod guard;
mod holder;
mod lies;
mod life;
mod link;
mod liveness;
mod proxy;
mod queues;
mod share;
mod storm;

use interlock_core::Duration;
use serde_json::{Value, json};

use proxy::Proxy;

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// A policy with the instance's name and nothing special.
fn plain() -> Value {
    json!({ "instance": "t", "classes": [{ "name": "a" }, { "name": "b" }] })
}

/// Where the tables of [`plain`] are.
const TABLE: &str = "t/enforce";
const SHADOW: &str = "t/audit";

fn two() -> Proxy {
    let proxy = Proxy::new(2, &plain());
    // Both have joined.
    proxy.run(secs(1));
    proxy
}
