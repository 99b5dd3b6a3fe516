//! Waiting for a condition with a deadline: the only kind of waiting that a test against a real Envoy may do.

use std::time::{Duration, Instant};

/// How long a test waits for what is bound to happen. Generous: it is only ever reached by a failure.
pub const DEADLINE: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(10);

/// Looks at `condition` every 10 ms until it holds. `what` names it in the panic when `deadline` passes first.
///
/// # Panics
/// When the deadline passes.
pub async fn wait_for(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    wait_for_async(what, deadline, async || condition()).await;
}

/// [`wait_for`], for a condition that has to be asked for.
///
/// # Panics
/// When the deadline passes.
pub async fn wait_for_async(what: &str, deadline: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < deadline, "waited {deadline:?} in vain for: {what}");
        tokio::time::sleep(POLL).await;
    }
}
