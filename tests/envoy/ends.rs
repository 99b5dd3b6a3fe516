//! A stream can end in many ways, and each gives its locks back, once and at once: others stand in the queue behind it
//! and must get the lock long before its TTL.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use interlock_testkit::client::{Answer, Ask, Pending, traceparent};
use interlock_testkit::config::Route;
use interlock_testkit::envoy::Update;
use interlock_testkit::{Client, DEADLINE, Ended, RawClient, wait_for};
use serde_json::json;

use crate::world::{LONG, PROMPT, World, add_listener, policy};

/// Three requests for [`LONG`] behind whoever holds it, each over a connection of its own: on the holder's worker and on
/// another.
struct Queue {
    waiters: Vec<Pending>,
    before: usize,
}

impl Queue {
    async fn form(world: &World) -> Self {
        Self::form_behind(world, 0).await
    }

    /// `others` requests wait already.
    async fn form_behind(world: &World, others: u32) -> Self {
        let before = world.upstream.requests_to("/next").len();
        let waiters = (100..103).map(|owner| world.ask(owner, "/next", LONG).spawn()).collect();
        world.until_waiting(others + 3).await;
        assert_eq!(world.upstream.requests_to("/next").len(), before, "nobody passes while the lock is held");
        Self { waiters, before }
    }

    /// The lock became free at `since`, or a little before.
    async fn served(self, world: &World, since: Instant) {
        for waiter in self.waiters {
            let answer = waiter.answer().await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        let first = &world.upstream.requests_to("/next")[self.before];
        let took = first.arrived.saturating_duration_since(since);
        assert!(took < PROMPT, "the next one got the lock after {took:?}");
    }
}

/// One that holds the lock ends as it does, by itself once the upstream is opened; gives back its answer.
async fn ends(world: &World, holder: Ask, path: &str) -> Option<Answer> {
    let holder = holder.spawn();
    world.upstream.wait_for_requests(path, 1).await;
    let queue = Queue::form(world).await;
    world.upstream.open(path);
    let answer = holder.answer().await.ok();
    queue.served(world, Instant::now()).await;
    answer
}

/// Nothing expired and nothing was lost: whatever became free was given back.
async fn assert_all_given_back(world: &World) {
    world.assert_clean().await;
    for name in ["interlock_lease_expired_total", "interlock_lease_lost_total"] {
        assert_eq!(world.count(name, &[]).await, 0.0, "{name}");
    }
}

#[tokio::test]
async fn the_answer_is_complete() {
    let world = World::start().await;
    let answer = ends(&world, world.ask(1, "/done?hold", LONG), "/done").await.unwrap();
    assert_eq!(answer.status, 200);
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn clients_leave_while_they_are_parked() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let (h1, h2) = (Client::http1_fresh(), Client::http2());
    let leaving = [(&h1, 2), (&h2, 3)].map(|(client, owner)| world.ask_by(client, owner, "/left", LONG).spawn());
    let mut abrupt = RawClient::connect(world.envoy.address()).await.unwrap();
    let trace = traceparent(4);
    let headers = [("traceparent", trace.as_bytes()), ("lock", LONG.as_bytes())];
    abrupt.request("GET", "/left", &headers).await.unwrap();
    world.until_waiting(3).await;
    let queue = Queue::form_behind(&world, 3).await;
    for client in leaving {
        client.leave().await;
    }
    abrupt.reset().unwrap();
    world.until_waiting(3).await;
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    queue.served(&world, Instant::now()).await;
    assert!(world.upstream.requests_to("/left").is_empty());
    assert_eq!(world.count("interlock_acquire_total", &[("outcome", "cancelled")]).await, 3.0);
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn a_client_leaves_while_it_is_parked_with_some_of_its_locks() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", "order/2").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    // Sorted, it holds order/1 and waits for order/2.
    let leaving = world.ask(2, "/left", "order/2, order/1").spawn();
    world.until_waiting(1).await;
    let queue = Queue::form_behind(&world, 1).await;
    leaving.leave().await;
    queue.served(&world, Instant::now()).await;
    assert!(!holder.is_answered());
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    assert!(world.upstream.requests_to("/left").is_empty());
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn clients_leave_while_they_are_upstream() {
    let world = World::start().await;
    for (round, client) in [Client::http1_fresh(), Client::http2()].into_iter().enumerate() {
        let holder = world.ask_by(&client, 1, "/left?hold", LONG).spawn();
        world.upstream.wait_for_requests("/left", round + 1).await;
        let queue = Queue::form(&world).await;
        holder.leave().await;
        queue.served(&world, Instant::now()).await;
        let left = || world.upstream.requests_to("/left")[round].ended.map(|(how, _)| how);
        wait_for("the upstream to notice", DEADLINE, || left() == Some(Ended::Abandoned)).await;
    }
    assert_all_given_back(&world).await;
}

/// Many streams end in one moment: those that wait for each other's locks, and those that hold them.
#[tokio::test]
async fn a_connection_closes_with_many_requests_on_it() {
    let world = World::start().await;
    let client = Client::http2();
    let mut requests = vec![world.ask_by(&client, 1, "/left?hold", LONG).spawn()];
    world.upstream.wait_for_requests("/left", 1).await;
    for n in 0..20_u128 {
        requests.push(world.ask_by(&client, 1000 + n, "/left?hold", &format!("order/of-its-own-{n}")).spawn());
        requests.push(world.ask_by(&client, 2000 + n, "/parked", LONG).spawn());
        requests.push(world.ask_by(&client, 3000 + n, "/parked", &format!("order/0{n}, order/of-its-own-{n}")).spawn());
    }
    world.upstream.wait_for_requests("/left", 21).await;
    world.until_waiting(40).await;
    let queue = Queue::form_behind(&world, 40).await;
    for request in requests {
        request.leave().await;
    }
    drop(client);
    queue.served(&world, Instant::now()).await;
    world.upstream.wait_idle().await;
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn a_client_leaves_while_the_answer_streams() {
    let world = World::start().await;
    let mut client = RawClient::connect(world.envoy.address()).await.unwrap();
    let trace = traceparent(1);
    let headers = [("traceparent", trace.as_bytes()), ("lock", LONG.as_bytes())];
    client.request("GET", "/left?stall=60000", &headers).await.unwrap();
    world.upstream.wait_for_requests("/left", 1).await;
    let queue = Queue::form(&world).await;
    drop(client);
    queue.served(&world, Instant::now()).await;
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn the_upstream_breaks_off() {
    let world = World::start().await;
    let before = ends(&world, world.ask(1, "/before?hold&reset=before", LONG), "/before").await.unwrap();
    assert_eq!(before.status, 503);
    assert!(before.joined("lock-status").starts_with("test;outcome=acquired"), "{}", before.joined("lock-status"));
    let after = ends(&world, world.ask(1, "/after?hold&reset=after&body=1000", LONG), "/after").await;
    assert!(after.is_none(), "an answer that breaks off is no answer: {after:?}");
    assert_all_given_back(&world).await;
}

/// Envoy tries again by itself: that is still the one request, under the one grant.
#[tokio::test]
async fn the_upstream_breaks_off_and_is_tried_again() {
    let retried = Route::prefix("/retried").patch(|route| {
        route["route"]["retry_policy"] = json!({ "retry_on": "reset,5xx", "num_retries": 2 });
    });
    let world = World::with(|config| config.route(retried)).await;
    let answer = ends(&world, world.ask(1, "/retried?hold&reset=before", LONG), "/retried").await.unwrap();
    assert_eq!(answer.status, 503);
    let tries = world.upstream.requests_to("/retried");
    assert_eq!(tries.len(), 3);
    let fences = tries.iter().map(|request| request.header("lock-fence").unwrap()).collect::<Vec<_>>();
    assert!(fences.iter().all(|fence| *fence == fences[0]), "{fences:?}");
    let next = &world.upstream.requests_to("/next")[0];
    assert!(next.arrived >= tries[2].ended.unwrap().1, "the lock is held over all tries");
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn the_route_has_a_timeout() {
    let world = World::with(|config| config.route(Route::prefix("/slow").timeout("10s"))).await;
    let holder = world.ask(1, "/slow?hold", LONG).spawn();
    world.upstream.wait_for_requests("/slow", 1).await;
    let queue = Queue::form(&world).await;
    let answer = holder.answer().await.unwrap();
    let ended = Instant::now();
    assert_eq!((answer.status, answer.text().as_str()), (504, "upstream request timeout"));
    queue.served(&world, ended).await;
    assert_all_given_back(&world).await;
}

/// A holder that ends, one behind it that Envoy answers itself when its turn comes, and a queue behind both.
async fn answered_behind_a_holder(world: &World, path: &str, status: u16) {
    let before = world.upstream.requests_to("/held").len();
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", before + 1).await;
    let answered = world.ask(2, path, LONG).spawn();
    world.until_waiting(1).await;
    let queue = Queue::form_behind(world, 1).await;
    assert!(!answered.is_answered(), "it takes its turn");
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    let answer = answered.answer().await.unwrap();
    assert_eq!(answer.status, status, "{}", answer.text());
    let lock_status = answer.joined("lock-status");
    assert!(lock_status.starts_with("test;outcome=acquired;wait="), "{lock_status}");
    queue.served(world, Instant::now()).await;
    world.upstream.close("/held");
}

#[tokio::test]
async fn a_later_filter_rejects() {
    let denies = json!({
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
            "rules": { "action": "DENY", "policies": { "denied": {
                "permissions": [{ "url_path": { "path": { "prefix": "/denied" } } }],
                "principals": [{ "any": true }],
            } } },
        },
    });
    let aborts = json!({
        "name": "envoy.filters.http.fault",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "abort": { "http_status": 418, "percentage": { "numerator": 100 } },
            "headers": [{ "name": ":path", "string_match": { "prefix": "/aborted" } }],
        },
    });
    let world = World::with(|config| config.filter_after(denies).filter_after(aborts)).await;
    for (path, status) in [("/denied", 403), ("/aborted", 418)] {
        answered_behind_a_holder(&world, path, status).await;
        // Without waiting its locks are held for a moment only, on the way through the filters.
        let at_once = world.ask(3, path, LONG).send().await.unwrap();
        assert_eq!(at_once.status, status);
        let next = world.ask(4, "/free", LONG).send().await.unwrap();
        assert_eq!(next.status, 200, "{}", next.text());
    }
    assert!(world.upstream.requests().iter().all(|request| !["/denied", "/aborted"].contains(&request.bare_path())));
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn the_route_answers_by_itself() {
    let direct = Route::prefix("/direct").patch(|route| {
        route.as_object_mut().unwrap().remove("route");
        route["direct_response"] = json!({ "status": 418, "body": { "inline_string": "a teapot" } });
    });
    let world = World::with(|config| config.route(direct)).await;
    answered_behind_a_holder(&world, "/direct", 418).await;
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn no_upstream_is_there() {
    let unused = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let nobody: SocketAddr = unused.local_addr().unwrap();
    drop(unused);
    let world = World::with(|config| {
        let refused = Route::prefix("/refused").cluster("refused");
        let none = Route::prefix("/none").cluster("none");
        let config = config.cluster("refused", nobody).cluster("none", nobody).route(refused).route(none);
        config.patch(|bootstrap| {
            let clusters = bootstrap["static_resources"]["clusters"].as_array_mut().unwrap();
            let none = clusters.iter_mut().find(|cluster| cluster["name"] == "none").unwrap();
            none["load_assignment"]["endpoints"] = json!([]);
        })
    })
    .await;
    for path in ["/refused", "/none"] {
        answered_behind_a_holder(&world, path, 503).await;
    }
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn there_is_no_route() {
    let world = World::with(|config| {
        config.patch_routes(|routes| {
            let rest = routes.pop().unwrap();
            for prefix in ["/held", "/next"] {
                let mut route = rest.clone();
                route["match"]["prefix"] = json!(prefix);
                routes.push(route);
            }
        })
    })
    .await;
    answered_behind_a_holder(&world, "/nowhere", 404).await;
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn a_refusal_gives_back_what_it_had_by_then() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", "order/2").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    for wait in ["0", "0.2"] {
        let both = format!("order/1;wait={wait}, order/2;wait={wait}");
        let refused = world.ask(2, "/refused", &both).send().await.unwrap();
        assert_eq!(refused.status, 423, "{}", refused.text());
        let free = world.ask(3, "/free", "order/1;wait=0").send().await.unwrap();
        assert_eq!(free.status, 200, "{}", free.text());
    }
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    assert!(world.upstream.requests_to("/refused").is_empty());
    assert_all_given_back(&world).await;
}

/// A client that sent more than Envoy takes in of a parked request, and left: Envoy does not notice before it reads on,
/// so only the wait's end can end this wait.
#[tokio::test]
async fn a_client_leaves_unnoticed_while_a_big_body_is_parked() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let mut ghost = RawClient::connect(world.envoy.address()).await.unwrap();
    let trace = traceparent(2);
    let headers: [(&str, &[u8]); 3] =
        [("traceparent", trace.as_bytes()), ("lock", b"order/1;wait=10;ttl=60"), ("content-length", b"100000000")];
    ghost.request("POST", "/ghost", &headers).await.unwrap();
    // Until neither Envoy nor the kernel takes any more: the end of the connection stays behind what is unread.
    let all = vec![b'x'; 50_000_000];
    tokio::time::timeout(Duration::from_secs(1), ghost.send(&all)).await.unwrap_err();
    world.until_waiting(1).await;
    let queue = Queue::form_behind(&world, 1).await;
    drop(ghost);
    world.until_waiting(3).await;
    let timed_out = [("outcome", "refused"), ("reason", "wait-timeout")];
    assert_eq!(world.count("interlock_acquire_total", &timed_out).await, 1.0);
    assert!(!holder.is_answered());
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    queue.served(&world, Instant::now()).await;
    assert!(world.upstream.requests_to("/ghost").is_empty());
    assert_all_given_back(&world).await;
}

/// Envoy's own patience with a parked request is shorter than the policy's.
#[tokio::test]
async fn envoy_gives_up_on_an_idle_stream() {
    let patient =
        |prefix: &str| Route::prefix(prefix).timeout("0s").patch(|r| r["route"]["idle_timeout"] = json!("0s"));
    let world = World::with(|config| {
        let config = config.route(patient("/held")).route(patient("/next"));
        config.patch_hcm(|hcm| hcm["stream_idle_timeout"] = json!("10s"))
    })
    .await;
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let idle = world.ask(2, "/idle", LONG).spawn();
    world.until_waiting(1).await;
    let queue = Queue::form_behind(&world, 1).await;
    let answer = idle.answer().await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (504, "stream timeout"));
    world.until_waiting(3).await;
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    queue.served(&world, Instant::now()).await;
    assert_eq!(world.count("interlock_acquire_total", &[("outcome", "cancelled")]).await, 1.0);
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn envoy_gives_up_on_an_unfinished_request() {
    let world = World::with(|config| config.patch_hcm(|hcm| hcm["request_timeout"] = json!("8s"))).await;
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let mut unfinished = RawClient::connect(world.envoy.address()).await.unwrap();
    let trace = traceparent(2);
    let headers: [(&str, &[u8]); 3] =
        [("traceparent", trace.as_bytes()), ("lock", LONG.as_bytes()), ("content-length", b"10")];
    unfinished.request("POST", "/unfinished", &headers).await.unwrap();
    world.until_waiting(1).await;
    let answer = unfinished.response().await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (408, "request timeout"));
    world.until_waiting(0).await;
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    assert_eq!(world.ask(3, "/next", LONG).send().await.unwrap().status, 200);
    assert!(world.upstream.requests_to("/unfinished").is_empty());
    assert_eq!(world.count("interlock_acquire_total", &[("outcome", "cancelled")]).await, 1.0);
    assert_all_given_back(&world).await;
}

/// The listener that the holder came by is removed; Envoy ends what is left of its connections after a second.
#[tokio::test]
async fn the_listener_is_removed() {
    // Not quite the same policy: then Envoy gives each listener a root context of its own, in the same VMs.
    let mut another = policy();
    another["classes"].as_array_mut().unwrap().push(json!({ "name": "another" }));
    let mut world = World::with(|config| {
        let config = add_listener(config, "other", &another).listener_from_file();
        config.arg("--drain-time-s").arg("1").arg("--drain-strategy").arg("immediate")
    })
    .await;
    let other = format!("http://{}", world.envoy.listener("other").unwrap());
    let through_other = |owner, path: &str| {
        Client::http1_fresh().get(format!("{other}{path}")).trace(owner).header("lock", LONG).spawn()
    };
    let holder = through_other(1, "/gone?hold");
    world.upstream.wait_for_requests("/gone", 1).await;
    let parked = through_other(2, "/parked");
    world.until_waiting(1).await;
    let queue = Queue::form_behind(&world, 1).await;
    let removed = world.envoy.replace_listeners(|listeners| listeners.retain(|one| one["name"] != "other"));
    assert_eq!(removed.await.unwrap(), Update::Taken);
    holder.answer().await.unwrap_err();
    queue.served(&world, Instant::now()).await;
    // Its turn may come between the end of the holder's connection and that of its own: then it is forwarded, and ended there.
    parked.answer().await.unwrap_err();

    // The listener that stays is still told when a waiter's turn comes. Were it not, each waiter would look for itself,
    // which it does once a second: a dozen of them, one after the other, would take long.
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let waiters = (10..22).map(|owner| world.ask(owner, "/last", LONG).spawn()).collect::<Vec<_>>();
    world.until_waiting(12).await;
    let freed = Instant::now();
    world.upstream.open("/held");
    for request in waiters.into_iter().chain([holder]) {
        assert_eq!(request.answer().await.unwrap().status, 200);
    }
    let took = freed.elapsed();
    assert!(took < Duration::from_secs(3), "nobody was told: a dozen hand-overs took {took:?}");
    assert_all_given_back(&world).await;
}

#[tokio::test]
async fn envoy_itself_ends() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", LONG).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let waiters = (2..6).map(|owner| world.ask(owner, "/next", LONG).spawn()).collect::<Vec<_>>();
    world.until_waiting(4).await;
    let stopped = Instant::now();
    let log = world.envoy.stop().await.unwrap();
    assert!(stopped.elapsed() < PROMPT, "it had to be killed");
    for word in ["[critical]", "Segmentation", "assert failure", "interlock: "] {
        assert!(!log.contains(word), "{log}");
    }
    // Workers end one after the other: what the first gives back, a waiter on the other may still get, and be served with.
    assert!(holder.answer().await.ok().is_none_or(|answer| answer.status == 503));
    for waiter in waiters {
        let answer = waiter.answer().await.ok();
        assert!(answer.as_ref().is_none_or(|answer| [200, 503].contains(&answer.status)), "{answer:?}");
    }
    world.upstream.wait_idle().await;
    assert!(world.upstream.requests_to("/next").iter().all(|request| request.header("lock-fence").is_some()));
    world.upstream.checker().assert_clean();
}
