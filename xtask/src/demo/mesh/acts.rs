//! The three acts. Each gives back what did not go as it must.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use interlock_testkit::client::Pending;

use super::stage::{MAX_TTL, Stage};
use crate::demo::clients::{Clients, Transaction, slug, tell, told, until};
use crate::demo::screen::{GREEN, RED, Screen, YELLOW};
use crate::demo::services::{News, What};
use crate::soak::answer;

/// How soon a deadlock is to be refused. It takes milliseconds; the rest is for machines with other things to do.
const SOON: Duration = Duration::from_secs(1);
/// What is done beside a killed authority's restart, and how many do it at a time.
const LOAD: Duration = Duration::from_secs(3);
const CLIENTS: usize = 8;

/// Act 1: four transactions, each of which holds what the one before it wants.
pub async fn cycle(screen: &Screen, stage: &mut Stage) -> Result<Vec<String>> {
    screen.act(
        "Act 1: a cycle across four services",
        &[
            "Four transactions, one in each service. Each holds what its service locks, and calls the next service, where the",
            "next transaction holds what it wants. No service sees more than one step of this; the authority sees all of it:",
        ],
    );
    let plan = [
        ("orders", "/orders/42", "POST stock /stock/7"),
        ("stock", "/stock/7", "POST payments /accounts/ann"),
        ("payments", "/accounts/ann", "POST shipping /parcels/9"),
        ("shipping", "/parcels/9", "POST orders /orders/42"),
    ];
    let all = (1..=4).map(|n| Transaction::new(format!("T{n}"))).collect::<Vec<_>>();
    let start = Instant::now();
    let ask = |(t, (service, path, next)): (&Transaction, &(&str, &str, &str))| {
        t.post(&stage.services, stage.url(service, path)).header("x-meet", "").header("x-next", next).spawn()
    };
    let pending = all.iter().zip(&plan).map(ask).collect::<Vec<Pending>>();
    let who = |trace: &str| all.iter().find(|t| t.trace == trace).map_or_else(|| trace.to_owned(), |t| t.name.clone());
    let show = |news: &News| tell(screen, start, news, &who);

    let mut failures = Vec::new();
    let mut asked = start;
    let refusal = loop {
        let news = until(&mut stage.news, show, |news| !matches!(news.what, What::Came(..))).await?;
        match news.what {
            What::Calls(_) => asked = news.at,
            What::Answered { answer: Some(answer), .. } if slug(&answer) == "deadlock" => {
                break (news.at - asked, answer, news.trace);
            }
            What::Answered { call, answer } => {
                let status = answer.map(|answer| answer.status);
                failures.push(format!("{call} was answered {status:?} before any deadlock was refused"));
                return Ok(failures);
            }
            What::Came(..) => {}
        }
    };
    let (took, answer, victim) = refusal;
    let edges =
        serde_json::from_slice(&answer.body).ok().and_then(|problem| answer::edges(&problem)).unwrap_or_default();
    let chain = edges.iter().map(|(_, lock, by)| format!(" ─{lock}→ {}", who(by))).collect::<String>();
    println!();
    println!("   refused {} ms after the last of them asked, with the whole chain:", took.as_millis());
    println!("   {}{chain}", edges.first().map(|(owner, ..)| who(owner)).unwrap_or_default());
    screen.whole(&answer.text());
    println!();
    let mut check = |holds: bool, otherwise: &str| {
        if !holds {
            failures.push(otherwise.to_owned());
        }
    };
    let mut locks = edges.iter().map(|(_, lock, _)| lock.as_str()).collect::<Vec<_>>();
    locks.sort_unstable();
    check(locks == ["account/ann", "order/42", "parcel/9", "stock/7"], "the cycle does not go through all four locks");
    check(took < SOON, "the deadlock was not refused at once");
    // A victim has given back what it held: the others go on, and so does it when it tries again. Two that close the cycle at
    // the very same moment may both be refused.
    let mut victims = Vec::new();
    for ((transaction, place), pending) in all.iter().zip(&plan).zip(pending) {
        let answer = pending.answer().await?;
        let (colour, verb) = if answer.status == 200 { (GREEN, "completed") } else { (RED, "refused") };
        screen.event(start.elapsed(), &transaction.name, colour, verb, &told(&answer));
        match answer.status {
            200 => {}
            _ if slug(&answer) == "deadlock" => victims.push((transaction, place)),
            _ => check(false, "a transaction failed for another reason"),
        }
    }
    check(victims.iter().any(|(t, _)| t.trace == victim), "who was refused by the authority was served all the same");
    check(victims.len() <= 2, "more than two of the four had to try again");
    for (again, (service, path, next)) in victims {
        let ask = again.post(&stage.services, stage.url(service, path));
        let answer = ask.header("x-next", next).send().await?;
        let text = format!("{} at the second try", answer.status);
        screen.event(start.elapsed(), &again.name, GREEN, "completed", &text);
        check(answer.status == 200, "a victim did not complete when it tried again");
    }
    Ok(failures)
}

/// Act 2: the authority is killed while everybody works.
pub async fn restart(screen: &Screen, stage: &mut Stage) -> Result<Vec<String>> {
    screen.act(
        "Act 2: the authority is killed and restarted",
        &[
            "Eight clients work in all services, and one transaction holds its lock through all of it. The authority is killed",
            "with -9; another process takes its place and knows nothing. Sidecars renew what they hold, with the receipts that",
            "they were given:",
        ],
    );
    let start = Instant::now();
    let before = stage.services.gate().tally;
    let long = Transaction::new("long");
    let holds = LOAD * 2 + MAX_TTL;
    let long = long
        .post(&stage.services, stage.url("shipping", "/parcels/long"))
        .header("x-work", holds.as_millis().to_string())
        .spawn();
    let mut urls = Vec::new();
    for turn in 0..12 {
        let (service, path) =
            [("orders", "/orders"), ("stock", "/stock"), ("payments", "/accounts"), ("shipping", "/parcels")][turn % 4];
        urls.push(stage.url(service, &format!("{path}/{}", turn % 3)));
    }
    let clients = Clients::start(CLIENTS, &urls, &stage.services);
    tokio::time::sleep(LOAD).await;
    let killed = Instant::now();
    stage.kill_authority().await?;
    screen.event(start.elapsed(), "authority", RED, "killed", "kill -9, under load");
    stage.revive_authority().await?;
    let back = Instant::now();
    let text = format!("as another process, {} ms later; it grants nothing yet", (back - killed).as_millis());
    screen.event(start.elapsed(), "authority", YELLOW, "is back", &text);
    stage.until_granting().await?;
    screen.event(start.elapsed(), "authority", GREEN, "grants", "again: what lived has been renewed, or is over");
    tokio::time::sleep(LOAD).await;
    let mut seen = clients.stop().await?;
    let long = long.answer().await?;
    // What the services told meanwhile is in the sums.
    while stage.news.try_recv().is_ok() {}
    // What was on its way when it was killed had been granted before.
    let first = seen.granted.iter().copied().filter(|granted| *granted > back).min();
    let first = first.context("nothing was granted after the restart")?;
    let (cut, stopped, violations) = {
        let gate = stage.services.gate();
        (gate.tally.cut - before.cut, gate.tally.stopped - before.stopped, gate.violations.first.clone())
    };
    println!();
    println!(
        "   {} requests were served, {} turned away with 503 while nothing was granted",
        seen.served, seen.turned_away
    );
    println!("   {} leases were lost, {} sections overlapped, {stopped} writes came with an old fence", seen.lost, cut);
    println!(
        "   the first grant came {} ms after the kill, {} ms after the authority was back",
        (first - killed).as_millis(),
        first.saturating_duration_since(back).as_millis()
    );
    println!("   the long transaction, {} s: {}\n", holds.as_secs(), long.status);
    let mut failures = std::mem::take(&mut seen.failed);
    failures.extend(violations);
    let mut check = |holds: bool, otherwise: String| {
        if !holds {
            failures.push(otherwise);
        }
    };
    check(long.status == 200, format!("the long transaction was answered {} {}", long.status, slug(&long)));
    check(seen.in_vain == 0, format!("{} waited in vain", seen.in_vain));
    check(seen.lost == 0, format!("{} leases were lost", seen.lost));
    check(cut == 0 && stopped == 0, format!("something was granted twice: {cut} overlaps, {stopped} writes stopped"));
    let took = first.saturating_duration_since(back);
    check(took < MAX_TTL + SOON * 2, format!("it granted nothing for {took:?}"));
    let left = stage.locks_left().await?;
    check(left.is_none(), format!("locks are left: {}", left.unwrap_or_default()));
    Ok(failures)
}

/// Act 3: a writer that slept past the end of its lease.
pub async fn stale(screen: &Screen, stage: &mut Stage) -> Result<Vec<String>> {
    screen.act(
        "Act 3: a writer that comes too late",
        &[
            "T1 holds order/42, and its whole sidecar is stopped (SIGSTOP) with the write of T1 in it. The lease is not renewed",
            "and ends; T2 gets the lock and writes. Then the sidecar goes on, and the old write arrives at the guard:",
        ],
    );
    let (late, next) = (Transaction::new("T1"), Transaction::new("T2"));
    let names = [(late.trace.clone(), "T1"), (next.trace.clone(), "T2")];
    let who = move |trace: &str| names.iter().find(|(t, _)| t == trace).map_or(trace, |(_, name)| name).to_owned();
    let start = Instant::now();
    let show = |news: &News| tell(screen, start, news, &who);
    let write = "PUT stock /reservations/42";
    let pending = late
        .post(&stage.services, stage.url("orders", "/orders/42"))
        .header("x-hold", "")
        .header("x-next", write)
        .spawn();
    let came = |trace: String| move |news: &News| news.trace == trace && matches!(news.what, What::Came(..));
    until(&mut stage.news, show, came(late.trace.clone())).await?;
    stage.sidecars.get_mut("orders").context("no sidecar")?.freeze()?;
    screen.event(
        start.elapsed(),
        "orders",
        RED,
        "stopped",
        "SIGSTOP to the sidecar; the service behind it does not know",
    );
    stage.services.go();
    let calls = |trace: String| move |news: &News| news.trace == trace && matches!(news.what, What::Calls(..));
    until(&mut stage.news, show, calls(late.trace.clone())).await?;
    let second = next.post(&stage.services, stage.url("payments", "/refunds/42")).header("x-next", write).spawn();
    let done = |trace: String| move |news: &News| news.trace == trace && matches!(news.what, What::Answered { .. });
    let written = until(&mut stage.news, show, done(next.trace.clone())).await?;
    stage.sidecars.get_mut("orders").context("no sidecar")?.thaw()?;
    screen.event(start.elapsed(), "orders", YELLOW, "goes on", "SIGCONT: the write of T1 is on its way");
    let stopped = until(&mut stage.news, show, done(late.trace.clone())).await?;
    let (second, first) = (second.answer().await?, pending.answer().await?);
    screen.event(start.elapsed(), "T2", GREEN, "completed", &second.status.to_string());
    screen.event(start.elapsed(), "T1", RED, "ended", &told(&first));
    println!();
    let mut failures = Vec::new();
    let mut check = |holds: bool, otherwise: String| {
        if !holds {
            failures.push(otherwise);
        }
    };
    let status = |news: &News| match &news.what {
        What::Answered { answer: Some(answer), .. } => (answer.status, slug(answer)),
        _ => (0, String::new()),
    };
    if let What::Answered { answer: Some(answer), .. } = &stopped.what {
        println!("   what the guard told it:");
        screen.whole(&answer.text());
        println!();
    }
    check(status(&written).0 == 200, format!("the second writer was answered {:?}", status(&written)));
    let late = status(&stopped);
    check(late == (412, "stale-fence".to_owned()), format!("the late writer was answered {late:?}"));
    check(second.status == 200, format!("the second transaction was answered {}", second.status));
    check(first.status >= 400, format!("the late transaction was told {}: that all is well", first.status));
    Ok(failures)
}
