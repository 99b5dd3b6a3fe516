//! `cargo xtask demo etcd`: two services with a sidecar each, as envoy/etcd has it, and an etcd of three members, in two acts with
//! checks of their own. What is shown is what happened: nothing here knows how an act will end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use interlock_testkit::{Envoy, EnvoyConfig, Etcd, Upstream, tools};
use serde_json::json;
use tokio::sync::mpsc;

use super::clients::{Clients, Seen, Transaction, slug, tell, told, until};
use super::screen::{GREEN, RED, Screen, YELLOW};
use super::services::{News, PATIENCE, Services, What};
use crate::run;
use crate::soak::answer;

const SERVICES: [&str; 2] = ["orders", "billing"];
const MEMBERS: usize = 3;
/// How soon a deadlock is to be refused. It takes milliseconds; the rest is for machines with other things to do.
const SOON: Duration = Duration::from_secs(1);
/// How long clients work before a member is killed, and while it is away and locks are granted all the same.
const LOAD: Duration = Duration::from_secs(3);
const CLIENTS: usize = 8;

/// Plays the two acts.
///
/// # Errors
/// When something could not be started, or an act did not go as it must.
pub fn play() -> Result<()> {
    // Before the curtain: either may have to be installed.
    println!("etcd: {} and {}", tools::etcd()?.display(), tools::etcdctl()?.display());
    run::block_on(async {
        let screen = Screen::new();
        let mut stage = Stage::set().await.context("etcd and its sidecars could not be started")?;
        let mut failed = 0;
        for act in 1..=2 {
            let failures = match act {
                1 => cycle(&screen, &mut stage).await,
                _ => deaths(&screen, &mut stage).await,
            };
            let failures = failures.with_context(|| format!("act {act} could not be played"))?;
            screen.verdict(&failures);
            failed += usize::from(!failures.is_empty());
        }
        if failed > 0 {
            bail!("{failed} of 2 acts did not go as they must");
        }
        Ok(())
    })
}

/// Everything that runs. Dropping it ends all of it.
struct Stage {
    services: Arc<Services>,
    news: mpsc::UnboundedReceiver<News>,
    sidecars: BTreeMap<&'static str, Envoy>,
    etcd: Etcd,
    _apps: Vec<Upstream>,
}

impl Stage {
    /// Starts everything, and waits until etcd can be asked.
    async fn set() -> Result<Self> {
        let etcd = Etcd::with(MEMBERS, &[]).await?;
        let members: Vec<_> = etcd.members().iter().map(|member| member.address()).collect();
        let (sender, news) = mpsc::unbounded_channel();
        let services = Services::new(sender, SERVICES.len());
        let (mut apps, mut sidecars) = (Vec::new(), BTreeMap::new());
        for name in SERVICES {
            let serving = Arc::clone(&services);
            let app = Upstream::forgetful(move |request| Arc::clone(&serving).serve(name, request)).await?;
            let config =
                EnvoyConfig::from_file(&tools::root().join("envoy/etcd/sidecar.yaml"))?.log_levels("wasm:warn");
            // What ships takes orders in the order of their names, and refuses what could become a deadlock sooner than that.
            let config = config.patch_policy(|policy| policy["classes"][0]["within"] = json!("unordered"));
            let config = config.concurrency(1).cluster("app", app.address()).endpoints("etcd", &members);
            let envoy = Envoy::start(config).await.with_context(|| format!("the sidecar of {name}"))?;
            apps.push(app);
            sidecars.insert(name, envoy);
        }
        // Each calls the other at its sidecar, where the lock is.
        for (name, other) in SERVICES.iter().zip(SERVICES.iter().rev()) {
            services.calls_through(name, sidecars[other].address());
        }
        let stage = Stage { services, news, sidecars, etcd, _apps: apps };
        stage.until_whole().await?;
        Ok(stage)
    }

    /// Where an order is captured: at a service's sidecar.
    fn url(&self, service: &str, order: usize) -> String {
        format!("{}{}", self.sidecars[service].base_url(), path(order))
    }

    /// Waits until all sidecars see all members well.
    async fn until_whole(&self) -> Result<()> {
        let start = Instant::now();
        for envoy in self.sidecars.values() {
            while envoy.stat("cluster.etcd.membership_healthy").await? < MEMBERS as u64 {
                if start.elapsed() > PATIENCE {
                    bail!("a sidecar does not see all members of etcd");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// The keys of locks that are left in etcd once nobody holds any; those that still are when that takes too long. Locks are
    /// given back without being waited for.
    async fn keys_left(&self) -> Result<Vec<String>> {
        let start = Instant::now();
        loop {
            let mut left = self.etcd.keys("/interlock/q/")?;
            left.extend(self.etcd.keys("/interlock/o/")?);
            if left.is_empty() || start.elapsed() > PATIENCE {
                return Ok(left);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn path(order: usize) -> String {
    format!("/orders/{order}/capture")
}

/// Act 1: two transactions, each of which holds what the other wants.
async fn cycle(screen: &Screen, stage: &mut Stage) -> Result<Vec<String>> {
    screen.act(
        "Act 1: a deadlock that no sidecar sees alone",
        &[
            "Two transactions, one in each service. Each holds an order that its service locked, and calls the other service for",
            "the other order. The sidecars know nothing of each other; what both wait for is in etcd:",
        ],
    );
    let plan = [("orders", 1, "billing", 2), ("billing", 2, "orders", 1)];
    let all = [Transaction::new("T1"), Transaction::new("T2")];
    let start = Instant::now();
    let mut pending = Vec::new();
    for (t, (service, order, other, next)) in all.iter().zip(plan) {
        let next = format!("POST {other} {}", path(next));
        let ask = t.post(&stage.services, stage.url(service, order)).header("x-meet", "").header("x-next", &next);
        pending.push(ask.spawn());
    }
    let who = |trace: &str| all.iter().find(|t| t.trace == trace).map_or_else(|| trace.to_owned(), |t| t.name.clone());
    let show = |news: &News| tell(screen, start, news, &who);
    let mut asked = start;
    let (took, refusal) = loop {
        let news = until(&mut stage.news, show, |news| !matches!(news.what, What::Came(..))).await?;
        match news.what {
            What::Calls(_) => asked = news.at,
            What::Answered { answer: Some(answer), .. } if slug(&answer) == "deadlock" => {
                break (news.at - asked, answer);
            }
            What::Answered { call, answer } => {
                let told = answer.map_or_else(|| "nothing".to_owned(), |answer| told(&answer));
                return Ok(vec![format!("{call} was answered {told} before any deadlock was refused")]);
            }
            What::Came(..) => {}
        }
    };
    let edges =
        serde_json::from_slice(&refusal.body).ok().and_then(|problem| answer::edges(&problem)).unwrap_or_default();
    let chain = edges.iter().map(|(_, lock, by)| format!(" ─{lock}→ {}", who(by))).collect::<String>();
    println!("\n   refused {} ms after the last of them asked, with the whole chain:", took.as_millis());
    println!("   {}{chain}", edges.first().map(|(owner, ..)| who(owner)).unwrap_or_default());
    screen.whole(&refusal.text());
    println!();
    let mut failures = Vec::new();
    let mut check = |holds: bool, otherwise: &str| {
        if !holds {
            failures.push(otherwise.to_owned());
        }
    };
    let mut locks = edges.iter().map(|(_, lock, _)| lock.as_str()).collect::<Vec<_>>();
    locks.sort_unstable();
    check(locks == ["order/1", "order/2"], "the cycle does not go through both locks");
    check(took < SOON, "the deadlock was not refused at once");
    // A victim has given back what it held: the other goes on, and so does it when it tries again. Two that close the cycle at
    // the very same moment may both be refused.
    let mut victims = Vec::new();
    for ((transaction, place), pending) in all.iter().zip(plan).zip(pending) {
        let answer = pending.answer().await?;
        let (colour, verb) = if answer.status == 200 { (GREEN, "completed") } else { (RED, "refused") };
        screen.event(start.elapsed(), &transaction.name, colour, verb, &told(&answer));
        match answer.status {
            200 => {}
            _ if slug(&answer) == "deadlock" => victims.push((transaction, place)),
            _ => check(false, "a transaction failed for another reason"),
        }
    }
    check(!victims.is_empty(), "nobody was refused in the end");
    for (again, (service, order, other, next)) in victims {
        let ask = again.post(&stage.services, stage.url(service, order));
        let answer = ask.header("x-next", format!("POST {other} {}", path(next))).send().await?;
        let text = format!("{} at the second try", answer.status);
        screen.event(start.elapsed(), &again.name, GREEN, "completed", &text);
        check(answer.status == 200, "a victim did not complete when it tried again");
    }
    Ok(failures)
}

/// Act 2: a member is killed while everybody works, and then the leader.
async fn deaths(screen: &Screen, stage: &mut Stage) -> Result<Vec<String>> {
    screen.act(
        "Act 2: members of etcd are killed",
        &[
            "Eight clients capture three orders through both sidecars. A member that follows is killed with -9, and comes back; then the",
            "leader. What was on its way to it is refused; no lock is lost, and none is granted twice:",
        ],
    );
    let start = Instant::now();
    let before = stage.services.gate().tally;
    let urls: Vec<_> = (0..6).map(|n| stage.url(SERVICES[n % 2], n % 3)).collect();
    let clients = Clients::start(CLIENTS, &urls, &stage.services);
    let mut away = Vec::new();
    for leads in [false, true] {
        tokio::time::sleep(LOAD).await;
        let leader = stage.etcd.leader().await?;
        let victim = if leads { leader } else { (leader + 1) % MEMBERS };
        stage.etcd.kill(victim);
        let killed = Instant::now();
        let what = if leads { "the leader" } else { "a follower" };
        screen.event(
            start.elapsed(),
            &format!("member {victim}"),
            RED,
            "killed",
            &format!("kill -9, under load: {what}"),
        );
        // Where it led, the others elect another one first.
        clients.until_granted().await.with_context(|| format!("after the death of {what}"))?;
        tokio::time::sleep(LOAD).await;
        let back = Instant::now();
        stage.etcd.run(victim)?;
        stage.etcd.ready().await?;
        stage.until_whole().await?;
        screen.event(
            start.elapsed(),
            &format!("member {victim}"),
            YELLOW,
            "is back",
            "and is asked again by both sidecars",
        );
        away.push((what, killed, back));
    }
    tokio::time::sleep(LOAD).await;
    let seen = clients.stop().await?;
    // What the services told meanwhile is in the sums.
    while stage.news.try_recv().is_ok() {}
    let (cut, stopped, violations) = {
        let gate = stage.services.gate();
        (gate.tally.cut - before.cut, gate.tally.stopped - before.stopped, gate.violations.first.clone())
    };
    let Seen { served, lost, in_vain, turned_away, failed, granted } = seen;
    println!("\n   {served} requests were served, {turned_away} turned away with 503, {in_vain} waited in vain");
    println!("   {lost} leases were lost, {cut} sections overlapped, {stopped} writes came with an old fence");
    let mut failures = failed;
    failures.extend(violations);
    for (what, killed, back) in away {
        let first = granted.iter().filter(|at| **at > killed).min().map(|at| at.duration_since(killed));
        let meanwhile = granted.iter().filter(|at| (killed..back).contains(at)).count();
        println!(
            "   without {what}: {meanwhile} grants, the first {} ms after its death",
            first.unwrap_or_default().as_millis()
        );
        if meanwhile == 0 {
            failures.push(format!("nothing was granted while {what} was away"));
        }
    }
    println!();
    let left = stage.keys_left().await?;
    let mut check = |holds: bool, otherwise: String| {
        if !holds {
            failures.push(otherwise);
        }
    };
    check(lost == 0, format!("{lost} leases were lost"));
    check(cut == 0 && stopped == 0, format!("something was granted twice: {cut} overlaps, {stopped} writes stopped"));
    check(left.is_empty(), format!("keys are left: {left:?}"));
    Ok(failures)
}
