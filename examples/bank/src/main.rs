//! `bank accounts` and `bank transfers`: one of the two services, until it is interrupted.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};

use bank::accounts;
use bank::hop::Proxy;
use bank::ledger::Cents;
use bank::transfers;

/// One of the two services of the bank.
#[derive(Parser)]
#[command(name = "bank", version, about)]
struct Args {
    #[command(subcommand)]
    service: Service,

    /// Where Envoy is: all calls to the other service, and to other accounts, go through it.
    #[arg(long, global = true, env = "BANK_PROXY", default_value = "http://127.0.0.1:10000")]
    proxy: String,
}

#[derive(Subcommand)]
enum Service {
    /// Keeps the books: GET /accounts, GET /accounts/{id}, POST /accounts/{id}/debit, POST /accounts/{id}/credit.
    Accounts {
        #[arg(long, default_value_t = 8001)]
        port: u16,
        /// An account and its cents, as often as needed.
        #[arg(long = "account", value_name = "NAME=CENTS", value_parser = opening, default_values = ["ann=100000", "bob=100000", "cat=100000"])]
        accounts: Vec<(String, Cents)>,
        /// How long a write to the books takes, in milliseconds: the longer, the sooner transfers meet.
        #[arg(long, default_value_t = 20, value_name = "MS")]
        write_time: u64,
    },
    /// Takes transfers: POST /transfers with an idempotency-key.
    Transfers {
        #[arg(long, default_value_t = 8002)]
        port: u16,
    },
}

fn opening(text: &str) -> Result<(String, Cents), String> {
    let (name, cents) = text.split_once('=').ok_or("it is written NAME=CENTS")?;
    if !bank::ledger::is_account_name(name) {
        return Err(format!("{name:?} is not the name of an account: letters, digits, - and _"));
    }
    Ok((name.to_owned(), cents.parse().map_err(|e| format!("{cents:?} is not a number of cents: {e}"))?))
}

#[tokio::main]
async fn main() -> ExitCode {
    match serve(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let proxy = Proxy::new(&args.proxy)?;
    let (port, router) = match args.service {
        Service::Accounts { port, accounts, write_time } => {
            let config = accounts::Config {
                opening: accounts,
                write_time: Duration::from_millis(write_time),
                proxy,
                observer: Arc::new(|event| println!("{event}")),
            };
            (port, accounts::router(config))
        }
        Service::Transfers { port } => (port, transfers::router(proxy)),
    };
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    println!("listening on http://{}, proxy at {}", listener.local_addr()?, args.proxy);
    let interrupted = async {
        // Without a handler for the signal its default ends the process as well.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    bank::serve(listener, router, interrupted).await.context("serve")
}
