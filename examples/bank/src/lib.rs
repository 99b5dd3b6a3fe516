//! A bank of two services behind one Envoy: the example that shows what Interlock is for.
//!
//! `transfers` takes transfers in; `accounts` keeps the books. All calls between them go through the proxy, and neither
//! knows of Interlock: the policy in `envoy/local.yaml` locks each hop. What each part is for:
//!
//! - [`ledger`]: balances and the steps of a transfer, pure.
//! - [`locks`]: the locks that the service has of its own, and that deadlock.
//! - [`accounts`], [`transfers`]: the services.
//! - [`hop`]: calls between them, through the proxy.
//! - [`client`]: who asks for transfers, and tries again what was refused.

pub mod accounts;
pub mod client;
pub mod event;
pub mod hop;
pub mod ledger;
pub mod locks;
pub mod transfers;

use std::io;

pub use axum::Router;
use tokio::net::TcpListener;

/// Serves one of the services until `over` is.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    over: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(over).await
}
