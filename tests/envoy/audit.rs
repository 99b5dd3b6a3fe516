//! `enforcement` by share, `audit` and `off`: what is decided without anyone noticing, and what is not decided at all.

use interlock::policy::{Enforcement, Policy};
use interlock_core::OwnerId;
use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, wait_for_async};
use serde_json::{Value, json};

use crate::common::{DEADLINE, Lane, Plan, Stage, reloads, run, waited};

static STAGE: Stage = Stage::new(|| {
    let classes = json!([
        { "name": "account", "rank": 10 },
        { "name": "order", "rank": 20 },
        { "name": "vault", "principals": ["spiffe://mesh/*"] },
    ]);
    let rule = |name, enforcement| {
        json!([{
            "name": name,
            "match": { "path": format!("/{name}/{{id}}") },
            "locks": [{ "name": "order/{id}" }],
            "enforcement": enforcement,
        }])
    };
    let audited = json!({ "enforcement": "audit", "classes": classes, "defaults": { "wait": "20s" } });
    let timed = json!({ "enforcement": "audit", "classes": [{ "name": "timed" }] });
    let strict = json!({ "enforcement": "audit", "rules": rule("strict", "enforce") });
    let lenient = json!({ "rules": rule("lenient", "audit") });
    let unwatched = json!({ "rules": rule("unwatched", "off") });
    vec![
        ("audit", Plan::new(audited)),
        ("timed", Plan::new(timed)),
        ("strict", Plan::new(strict)),
        ("lenient", Plan::new(lenient)),
        ("unwatched", Plan::new(unwatched)),
        ("partly", Plan::new(partly())),
        ("off", Plan::new(json!({ "enforcement": "off" })).bare()),
    ]
});

fn partly() -> Value {
    json!({ "enforcement": { "enforce": "25%" }, "classes": [{ "name": "part" }] })
}

/// The numbers of owners that this build takes for part of the share of [`partly`], and of others.
fn owners_in_and_out() -> (Vec<u128>, Vec<u128>) {
    let policy = Policy::parse(partly().to_string().as_bytes(), &|_| None).unwrap();
    let Enforcement::Partly(share) = policy.enforcement else { panic!("{:?}", policy.enforcement) };
    (1..=40).partition(|number: &u128| share.has(&OwnerId::new(&format!("{number:032x}")).unwrap()))
}

/// What the caller of an audited request is told: the member of `lock-status`, and nothing else.
fn status_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.text(), "done\n");
    for header in ["lock-fence", "server-timing", "retry-after"] {
        assert_eq!(answer.header(header), None, "{header}");
    }
    answer.joined("lock-status")
}

async fn audited(lane: &Lane, class: &str, outcome: &str, reason: &str) -> f64 {
    let mut labels = vec![("class", class), ("outcome", outcome)];
    if !reason.is_empty() {
        labels.push(("reason", reason));
    }
    lane.envoy().metric("interlock_audit_total", &labels).await.unwrap()
}

#[test]
fn what_would_be_refused_passes_and_is_counted() {
    run(async {
        let lane = STAGE.lane("audit").await;
        let first = lane.hold(1, "/first", "order/1").await;
        let lock = |ask: Ask, lock: &str| ask.header("lock", lock);
        // Each is upstream while the first one is, whatever it asks for and whoever it is.
        let mut all = Vec::new();
        for (path, owner, locks) in [
            ("/waits", 2, "order/1;wait=20"),
            ("/held", 3, "order/1;wait=0"),
            ("/order", 1, "account/1"),
            ("/malformed", 4, "order//1"),
            ("/forbidden", 5, "vault/1"),
            ("/many", 6, "a/1, a/2, a/3, a/4, a/5, a/6, a/7, a/8, a/9, a/10, a/11, a/12, a/13, a/14, a/15, a/16, a/17"),
        ] {
            all.push(lane.keep(path, lock(lane.ask(owner, &format!("{path}?hold")), locks)).await);
        }
        assert_eq!(lane.upstream().live(), 7);
        for request in lane.upstream().requests() {
            // What the filter is there to set is the filter's to remove, too.
            assert_eq!(request.header("lock"), None, "{}", request.path);
            assert_eq!(request.header("lock-fence"), None, "{}", request.path);
        }
        let mut statuses = Vec::new();
        for holder in all {
            statuses.push(status_of(&holder.release().await));
        }
        waited(&statuses[0], "audit;outcome=audit");
        let expected = [
            "audit;outcome=audit;reason=lock-held;lock=\"order/1\"",
            "audit;outcome=audit;reason=order-violation;lock=\"account/1\"",
            "audit;outcome=audit;reason=malformed-annotation",
            "audit;outcome=audit;reason=forbidden;lock=\"vault/1\"",
            "audit;outcome=audit;reason=too-many-locks;lock=\"a/1\"",
        ];
        assert_eq!(statuses[1..], expected);
        waited(&status_of(&first.release().await), "audit;outcome=audit");
        for (class, outcome, reason) in [
            ("order", "acquired", ""),
            ("order", "refused", "lock-held"),
            ("account", "refused", "order-violation"),
            ("vault", "refused", "forbidden"),
        ] {
            assert_eq!(audited(&lane, class, outcome, reason).await, 1.0, "{class} {outcome} {reason}");
        }
        let acquired = [("class", "order")];
        assert_eq!(lane.envoy().metric("interlock_acquire_total", &acquired).await.unwrap(), 0.0);
        lane.quiet().await;
    });
}

#[test]
fn a_wait_is_watched_to_its_end() {
    run(async {
        let lane = STAGE.lane("timed").await;
        let first = lane.hold(1, "/first", "timed/1").await;
        // One would wait in vain; the other would get the lock once the first gives it back.
        let late = lane.hold(2, "/late", "timed/1;wait=0.2").await;
        let counted = |reason: &'static str, outcome: &'static str| audited(&lane, "timed", outcome, reason);
        let what = "the wait to run out";
        wait_for_async(what, DEADLINE, async || counted("wait-timeout", "refused").await == 1.0).await;
        assert_eq!(status_of(&late.release().await), "timed;outcome=audit;reason=wait-timeout;lock=\"timed/1\"");
        let next = lane.hold(3, "/next", "timed/1;wait=20").await;
        waited(&status_of(&first.release().await), "timed;outcome=audit");
        wait_for_async("the hand-over", DEADLINE, async || counted("", "acquired").await == 2.0).await;
        assert!(waited(&status_of(&next.release().await), "timed;outcome=audit") > 0.0);
        // A cycle of two, which no one sees as a wait.
        let one = lane.hold(1, "/one", "timed/1").await;
        let two = lane.hold(2, "/two", "timed/2").await;
        let waits = lane.hold(1, "/waits", "timed/2;wait=20").await;
        let closes = lane.hold(2, "/closes", "timed/1;wait=20").await;
        assert_eq!(status_of(&closes.release().await), "timed;outcome=audit;reason=deadlock;lock=\"timed/1\"");
        for holder in [waits, two, one] {
            assert_eq!(holder.release().await.status, 200);
        }
        lane.quiet().await;
    });
}

#[test]
fn a_rule_may_enforce_where_the_policy_audits() {
    run(async {
        let lane = STAGE.lane("strict").await;
        let holder = lane.keep("/strict/1", lane.ask(1, "/strict/1?hold")).await;
        assert!(holder.seen.header("lock-fence").is_some());
        let refused = lane.ask(2, "/strict/1?wait").header("lock", "order/1;wait=0").send().await.unwrap();
        assert_eq!(refused.status, 423);
        // The shadow table is another one: what is enforced is not in it, and the other way round.
        let audited = lane.ask(3, "/other").header("lock", "order/1;wait=0").send().await.unwrap();
        waited(&status_of(&audited), "strict;outcome=audit");
        let answer = holder.release().await;
        waited(&answer.joined("lock-status"), "strict;outcome=acquired");
        lane.quiet().await;
    });
}

#[test]
fn a_rule_may_audit_where_the_policy_enforces() {
    run(async {
        let lane = STAGE.lane("lenient").await;
        let first = lane.keep("/lenient/1", lane.ask(1, "/lenient/1?hold")).await;
        let second = lane.ask(2, "/lenient/1").header("lock", "order/1;wait=0").send().await.unwrap();
        assert_eq!(status_of(&second), "lenient;outcome=audit;reason=lock-held;lock=\"order/1\"");
        let enforced = lane.ask(3, "/enforced").header("lock", "order/1;wait=0").send().await.unwrap();
        waited(&enforced.joined("lock-status"), "lenient;outcome=acquired");
        waited(&status_of(&first.release().await), "lenient;outcome=audit");
        lane.quiet().await;
    });
}

#[test]
fn a_rule_may_be_off() {
    run(async {
        let lane = STAGE.lane("unwatched").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let passed = lane.ask(2, "/unwatched/1").send().await.unwrap();
        assert_eq!(passed.status, 200);
        assert_eq!(passed.header("lock-status"), None);
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

/// The plugin in Envoy decides about each owner as this build does, on every worker.
#[test]
fn a_share_of_the_owners_is_enforced() {
    run(async {
        let lane = STAGE.lane("partly").await;
        let (inside, outside) = owners_in_and_out();
        assert!(inside.len() >= 2 && outside.len() >= 2, "{inside:?}");
        let first = lane.hold(inside[0], "/enforced", "part/1").await;
        assert!(first.seen.header("lock-fence").is_some());
        let watched = lane.hold(outside[0], "/watched", "part/1").await;
        assert_eq!(watched.seen.header("lock-fence"), None);
        for worker in [0, 1] {
            let client = lane.client_on(worker).await;
            for owner in inside.iter().skip(1).chain(outside.iter().skip(1)) {
                let ask = client.get(lane.url("/ask")).trace(*owner).header("lock", "part/1;wait=0");
                let answer = ask.send().await.unwrap();
                if inside.contains(owner) {
                    assert_eq!(answer.status, 423, "{owner} on worker {worker}: {}", answer.text());
                } else {
                    let status = status_of(&answer);
                    assert_eq!(status, "partly;outcome=audit;reason=lock-held;lock=\"part/1\"", "{owner} on {worker}");
                }
            }
        }
        waited(&status_of(&watched.release().await), "partly;outcome=audit");
        waited(&first.release().await.joined("lock-status"), "partly;outcome=acquired");
        lane.quiet().await;
    });
}

#[test]
fn off_decides_nothing() {
    run(async {
        let lane = STAGE.lane("off").await;
        // Who asks for what nobody can give is as welcome as who asks for what another one has.
        let forged = [("lock-status", "other;outcome=x"), ("lock-fence", "a;fence=1;mode=shared")];
        let with = |ask: Ask| forged.iter().fold(ask, |ask, (name, value)| ask.header(name, value));
        let hold = |by: u128, path: &str, lock: &str| with(lane.ask(by, &format!("{path}?hold"))).header("lock", lock);
        let first = lane.keep("/first", hold(1, "/first", "order/1")).await;
        let second = lane.keep("/second", hold(2, "/second", "order/1, order//1")).await;
        assert_eq!(lane.upstream().live(), 2);
        for holder in [&first, &second] {
            // What only the filter may say is not forged here either.
            for name in ["lock", "lock-status", "lock-fence"] {
                assert_eq!(holder.seen.header(name), None, "{name}");
            }
        }
        for holder in [first, second] {
            let answer = holder.release().await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("lock-status"), None);
            assert_eq!(answer.header("lock-fence"), None);
        }
        let samples = lane.envoy().metrics().await.unwrap();
        let of_this = samples.iter().filter(|sample| sample.labels.get("instance").is_some_and(|of| of == "off"));
        assert_eq!(of_this.filter(|sample| sample.value != 0.0).count(), 0);
        assert!(reloads(lane.envoy()).await.is_empty());
    });
}
