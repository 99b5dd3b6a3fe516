//! The guard: Envoys beside services take the locks, the Envoy of a resource lets nothing pass that does not hold them.

use hyper::Method;
use interlock_testkit::client::Pending;
use interlock_testkit::{Answer, Client, DEADLINE, Envoy, EnvoyConfig, Recorded, Upstream};
use serde_json::{Value, json};

use crate::authority::mesh;
use crate::common::{Plan, Stage, owner, reloads, run};
use crate::problem::Refusal;
use crate::world::log_lines;

fn keys() -> Value {
    json!([{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }])
}

fn guard(check: &str) -> Value {
    json!([{ "match": { "methods": ["PUT", "POST"], "path": "/store/{id}" }, "lock": "order/{id}", "check": check }])
}

/// A service with its Envoy, which takes the locks, and the resource with its own, which guards it.
struct Mesh {
    service: Upstream,
    sidecar: Envoy,
    resource: Upstream,
    guard: Envoy,
}

/// What a service has been asked to do, and has not done yet.
struct Work {
    pending: Pending,
    /// The request as the service has it, with its fence.
    seen: Recorded,
    path: String,
}

fn guarding(resource: &Upstream) -> EnvoyConfig {
    let policy =
        json!({ "instance": "store", "classes": [{ "name": "order" }], "keys": keys(), "guard": guard("fence") });
    EnvoyConfig::local().policy(policy).upstream(resource.address())
}

impl Mesh {
    async fn start() -> Self {
        let (service, resource) = (Upstream::start().await.unwrap(), Upstream::start().await.unwrap());
        let policy = json!({
            "instance": "service", "classes": [{ "name": "order" }], "keys": keys(), "defaults": { "wait": "20s" },
            "rules": [{
                "name": "work", "match": { "path": "/work/{id}/{who}" }, "locks": [{ "name": "order/{id}" }],
                "on_lease_lost": "continue"
            }],
        });
        let config = EnvoyConfig::local().policy(policy).upstream(service.address());
        let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
        let (sidecar, guard) = tokio::join!(Envoy::start(config), Envoy::start(guarding(&resource)));
        Mesh { service, sidecar: sidecar.unwrap(), resource, guard: guard.unwrap() }
    }

    /// Has the service work on an order: it holds the lock, and has not written yet.
    async fn work(&self, id: u32, by: u128) -> Work {
        let path = format!("/work/{id}/{by}");
        let url = format!("{}{path}?hold", self.sidecar.base_url());
        let pending = Client::http1_fresh().get(url).trace(by).spawn();
        let seen = self.service.wait_for_requests(&path, 1).await.remove(0);
        assert!(seen.header("lock-fence").is_some_and(|fence| fence.contains(";sig=:")), "{seen:?}");
        Work { pending, seen, path }
    }

    /// The service has done its work: the lock is given back.
    async fn done(&self, work: Work) {
        self.service.open(&work.path);
        assert_eq!(work.pending.answer().await.unwrap().status, 200);
    }

    /// The service writes to the resource, as part of the work that it was asked for.
    async fn write(&self, seen: &Recorded, to: u32) -> Answer {
        self.write_by(seen, to, &self.guard).await
    }

    async fn write_by(&self, seen: &Recorded, to: u32, guard: &Envoy) -> Answer {
        let mut ask = Client::http1_fresh().ask(Method::PUT, format!("{}/store/{to}", guard.base_url()));
        for name in ["traceparent", "lock-fence"] {
            ask = ask.header(name, seen.header(name).unwrap());
        }
        ask.body("paid").send().await.unwrap()
    }

    /// How many writes have reached the resource.
    fn written(&self, to: u32) -> usize {
        self.resource.requests_to(&format!("/store/{to}")).len()
    }

    async fn assert_sound(&self) {
        for envoy in [&self.sidecar, &self.guard] {
            assert!(reloads(envoy).await.is_empty(), "a VM died");
        }
    }
}

fn slug(answer: &Answer) -> String {
    answer.json()["type"].as_str().unwrap().rsplit(':').next().unwrap().to_owned()
}

#[test]
fn a_late_writer_is_turned_away_once_the_next_holder_has_written() {
    run(async {
        let mesh = Mesh::start().await;
        // The caller leaves: its lock goes to the next, while the service still works for it.
        let early = mesh.work(1, 1).await;
        early.pending.leave().await;
        let next = mesh.work(1, 2).await;
        // Nobody has come after it yet: it harms nothing.
        assert_eq!(mesh.write(&early.seen, 1).await.status, 200);
        for _ in 0..2 {
            let answer = mesh.write(&next.seen, 1).await;
            assert_eq!((answer.status, answer.joined("lock-status").as_str()), (200, ""));
        }
        for attempt in 1..=2 {
            let late = mesh.write(&early.seen, 1).await;
            assert_eq!((late.status, slug(&late).as_str()), (412, "stale-fence"), "{}", late.text());
            assert_eq!(late.joined("lock-status"), "store;outcome=refused;reason=stale-fence;lock=\"order/1\"");
            assert_eq!(late.json()["owner"], owner(1));
            let labels = [("class", "order"), ("outcome", "refused"), ("reason", "stale-fence")];
            let count = f64::from(attempt);
            mesh.guard.wait_metric("interlock_guard_total", &labels, |refused| refused == count, DEADLINE).await;
        }
        assert_eq!(mesh.written(1), 3, "what is refused reaches nobody");
        let seen = mesh.resource.requests_to("/store/1").pop().unwrap();
        assert_eq!(seen.header("lock-fence"), next.seen.header("lock-fence"), "the resource may check it, too");
        let lines = log_lines(&mesh.guard, "refused");
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!((&lines[0]["reason"], &lines[0]["asked_by"]), (&json!("stale-fence"), &json!("guard[0]")));
        mesh.done(next).await;
        mesh.assert_sound().await;
    });
}

#[test]
fn only_what_an_envoy_with_the_key_has_signed_for_this_owner_and_lock_counts() {
    run(async {
        let mesh = Mesh::start().await;
        let holder = mesh.work(1, 1).await;
        let fence = holder.seen.header("lock-fence").unwrap();
        let put = |fence: Option<&str>, trace: u128, to: u32| {
            let ask = Client::http1_fresh().ask(Method::PUT, format!("{}/store/{to}", mesh.guard.base_url()));
            fence.into_iter().fold(ask.trace(trace), |ask, fence| ask.header("lock-fence", fence)).send()
        };
        let unsigned = fence.split(";sig").next().unwrap();
        let forged = fence.replacen("fence=", "fence=9", 1);
        for (what, fence, trace, to) in [
            ("no fence", None, 1, 1),
            ("no signature", Some(unsigned), 1, 1),
            ("another number", Some(forged.as_str()), 1, 1),
            ("another owner", Some(fence.as_str()), 2, 1),
            ("another lock", Some(fence.as_str()), 1, 2),
        ] {
            let answer = put(fence, trace, to).await.unwrap();
            assert_eq!((answer.status, slug(&answer).as_str()), (428, "fence-required"), "{what}");
        }
        assert_eq!((mesh.written(1), mesh.written(2)), (0, 0));
        assert_eq!(put(Some(&fence), 1, 1).await.unwrap().status, 200);
        // What is not guarded passes, and without what would be believed further on.
        let get = Client::http1_fresh().get(format!("{}/store/1", mesh.guard.base_url())).trace(2);
        assert_eq!(get.header("lock-fence", &fence).send().await.unwrap().status, 200);
        assert_eq!(mesh.resource.requests_to("/store/1")[1].header("lock-fence"), None);
        mesh.done(holder).await;
        mesh.assert_sound().await;
    });
}

#[test]
fn a_restart_of_the_resources_envoy_forgets_what_it_has_seen_until_the_holder_comes_by() {
    run(async {
        let mut mesh = Mesh::start().await;
        let early = mesh.work(1, 1).await;
        early.pending.leave().await;
        let next = mesh.work(1, 2).await;
        assert_eq!(mesh.write(&next.seen, 1).await.status, 200);
        assert_eq!(mesh.write(&early.seen, 1).await.status, 412);
        // Another replica has not seen the holder.
        let replica = Envoy::start(guarding(&mesh.resource)).await.unwrap();
        assert_eq!(mesh.write_by(&early.seen, 1, &replica).await.status, 200);
        let new = Envoy::start(guarding(&mesh.resource)).await.unwrap();
        std::mem::replace(&mut mesh.guard, new).kill().unwrap();
        assert_eq!(mesh.write(&early.seen, 1).await.status, 200, "as the documentation says");
        assert_eq!(mesh.write(&next.seen, 1).await.status, 200);
        assert_eq!(mesh.write(&early.seen, 1).await.status, 412);
        mesh.done(next).await;
        mesh.assert_sound().await;
    });
}

static STAGE: Stage = Stage::new(|| {
    let policy = |check: &str| {
        json!({
            "classes": [{ "name": "order" }], "defaults": { "wait": "20s", "ttl": "30s" }, "keys": keys(),
            "guard": guard(check),
        })
    };
    vec![("refusals", Plan::new(policy("fence"))), ("owner", Plan::new(policy("owner")))]
});

#[test]
fn a_guard_refuses_as_all_refusals_are() {
    run(async {
        let lane = STAGE.lane("refusals").await;
        let write = |by: u128, fence: Option<&str>| {
            let ask = Client::http1_fresh().ask(Method::PUT, lane.url("/store/1")).trace(by);
            fence.into_iter().fold(ask, |ask, fence| ask.header("lock-fence", fence)).send()
        };
        let required = Refusal {
            http: 428,
            grpc: 9,
            slug: "fence-required",
            lock: Some("order/1"),
            mode: None,
            owner: Some(1),
            retry: false,
        };
        required.check_http("refusals", &write(1, None).await.unwrap());
        let message = required.check_grpc("refusals", &lane.grpc(1, "/store/1").send().await.unwrap());
        assert_eq!(message, "order/1 is guarded, and the request carries no lock-fence for it");
        let first = lane.hold(1, "/first", "order/1").await;
        let early = first.seen.header("lock-fence").unwrap();
        first.release().await;
        let second = lane.hold(2, "/second", "order/1").await;
        let late = second.seen.header("lock-fence").unwrap();
        assert_eq!(write(2, Some(&late)).await.unwrap().status, 200);
        let stale = Refusal { http: 412, slug: "stale-fence", ..required };
        stale.check_http("refusals", &write(1, Some(&early)).await.unwrap());
        let grpc = lane.grpc(1, "/store/1").header("lock-fence", &early).send().await.unwrap();
        assert!(stale.check_grpc("refusals", &grpc).contains(" of order/1 is stale"));
        second.release().await;
        assert_eq!(lane.upstream().requests_to("/store/1").len(), 1);
        lane.quiet().await;
    });
}

#[test]
fn who_does_not_hold_the_lock_now_is_turned_away() {
    run(async {
        let lane = STAGE.lane("owner").await;
        let write = |by: u128| Client::http1_fresh().ask(Method::PUT, lane.url("/store/1")).trace(by).send();
        let refusal = Refusal {
            http: 412,
            grpc: 9,
            slug: "not-holder",
            lock: Some("order/1"),
            mode: None,
            owner: Some(1),
            retry: false,
        };
        refusal.check_http("owner", &write(1).await.unwrap());
        refusal.check_grpc("owner", &lane.grpc(1, "/store/1").send().await.unwrap());
        let holder = lane.hold(1, "/holder", "order/1").await;
        assert_eq!(write(1).await.unwrap().status, 200);
        let other = Refusal { owner: Some(2), ..refusal };
        let problem = other.check_http("owner", &write(2).await.unwrap());
        assert_eq!(problem["detail"], format!("{} does not hold order/1 now", owner(2)));
        holder.release().await;
        refusal.check_http("owner", &write(1).await.unwrap());
        assert_eq!(lane.upstream().requests_to("/store/1").len(), 1);
        lane.quiet().await;
    });
}

/// Two services that take locks at an authority, and the resource that both write to.
async fn at_an_authority(check: &str) -> mesh::Mesh {
    let mut service = mesh::policy();
    service["keys"] = keys();
    let mut resource = service.clone();
    resource["instance"] = json!("store");
    resource["guard"] = guard(check);
    mesh::Mesh::start(&[service.clone(), service, resource]).await
}

/// A service holds a lock at the authority, and has not written yet.
async fn holds(mesh: &mesh::Mesh, sidecar: usize, by: u128) -> (Pending, Recorded) {
    let sidecar = &mesh.sidecars[sidecar];
    let pending = sidecar.ask(by, &format!("/{by}?hold"), "order/1").spawn();
    (pending, sidecar.upstream.wait_for_requests(&format!("/{by}"), 1).await.remove(0))
}

async fn writes(mesh: &mesh::Mesh, by: u128, fence: Option<String>) -> Answer {
    let ask = Client::http1_fresh().ask(Method::PUT, mesh.sidecars[2].url("/store/1")).trace(by);
    fence.into_iter().fold(ask, |ask, fence| ask.header("lock-fence", fence)).send().await.unwrap()
}

#[test]
fn a_holder_that_stood_still_past_its_ttl_is_turned_away_after_the_next() {
    run(async {
        let mut mesh = at_an_authority("fence").await;
        let (stopped, early) = holds(&mesh, 0, 1).await;
        mesh.sidecars[0].envoy.freeze().unwrap();
        // It is granted when the lease of the first, which nobody renews, is over.
        let (next, late) = holds(&mesh, 1, 2).await;
        assert_eq!(writes(&mesh, 2, late.header("lock-fence")).await.status, 200);
        let refused = writes(&mesh, 1, early.header("lock-fence")).await;
        assert_eq!((refused.status, slug(&refused).as_str()), (412, "stale-fence"), "{}", refused.text());
        assert_eq!(mesh.sidecars[2].upstream.requests_to("/store/1").len(), 1, "what is refused reaches nobody");
        mesh.sidecars[0].envoy.thaw().unwrap();
        // It finds out that its lease is lost, and ends the request.
        assert_eq!(stopped.answer().await.unwrap().status, 409);
        mesh.sidecars[1].upstream.open("/2");
        assert_eq!(next.answer().await.unwrap().status, 200);
        mesh.sidecars[0].upstream.open("/1");
        mesh.assert_clean().await;
    });
}

#[test]
fn the_authority_is_asked_who_holds_the_lock() {
    run(async {
        let mut mesh = at_an_authority("owner").await;
        assert_eq!(writes(&mesh, 1, None).await.status, 412);
        let (holder, seen) = holds(&mesh, 0, 1).await;
        for fence in [None, seen.header("lock-fence")] {
            let passed = writes(&mesh, 1, fence).await;
            assert_eq!(passed.status, 200, "{}", passed.text());
        }
        let other = writes(&mesh, 2, None).await;
        assert_eq!((other.status, slug(&other).as_str()), (412, "not-holder"), "{}", other.text());
        mesh.sidecars[0].upstream.open("/1");
        assert_eq!(holder.answer().await.unwrap().status, 200);
        mesh.until_free("order/1").await;
        assert_eq!(writes(&mesh, 1, seen.header("lock-fence")).await.status, 412, "it has given the lock back");
        assert_eq!(mesh.sidecars[2].upstream.requests_to("/store/1").len(), 2);
        mesh.assert_clean().await;
        mesh.kill_authority();
        let unknown = writes(&mesh, 1, None).await;
        assert_eq!((unknown.status, slug(&unknown).as_str()), (503, "backend-unavailable"), "{}", unknown.text());
        assert_eq!(mesh.sidecars[2].upstream.requests_to("/store/1").len(), 2);
    });
}
