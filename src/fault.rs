//! Faults on demand, so that tests can kill a VM. Compiled only with the feature `fault-injection`, which ships nowhere.

use crate::host::{Headers, Host};

/// Traps if the request asks for it.
pub fn inject(host: &dyn Host) {
    let fault = host.header(Headers::Request, "x-interlock-fault").ok().flatten();
    if fault.as_deref() == Some(b"panic") {
        #[cfg(target_arch = "wasm32")]
        core::arch::wasm32::unreachable();
    }
}
