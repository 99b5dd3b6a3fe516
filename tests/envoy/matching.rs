//! Where annotations come from: rules, route metadata, headers; and where the filter runs at all.

use hyper::Method;
use interlock_testkit::client::Ask;
use interlock_testkit::{Client, EnvoyConfig, Route};
use serde_json::json;

use crate::common::{Lane, Plan, Stage, locks, run};

static STAGE: Stage = Stage::new(|| {
    let rules = json!([
        {
            "name": "capture",
            "match": { "methods": ["POST"], "path": "/orders/{id}/capture" },
            "locks": [{ "name": "order/{id}" }, { "name": "account/{header:x-account}", "mode": "shared" }],
        },
        {
            "name": "gold-items",
            "match": { "path": "/items/{id}", "headers": { "x-tier": "gold" } },
            "locks": [{ "name": "gold/{id}" }],
        },
        {
            "name": "items",
            "match": { "path": "/items/{id}" },
            "locks": [{ "name": "item/{query:kind}/{method}/{id}" }],
        },
        { "name": "files", "match": { "path": "/files/{*rest}" }, "locks": [{ "name": "file/{rest}" }] },
        { "name": "tagged", "match": { "headers": { "x-tag": "*" } }, "locks": [{ "name": "tag/{header:x-tag}" }] },
        { "name": "named", "match": { "route": "by-name" }, "locks": [{ "name": "route/1" }] },
    ]);
    let header = |what: &str| Plan::new(json!({ "annotations": { "header": what } }));
    vec![
        ("rules", Plan::new(json!({ "rules": rules })).patch(named_route)),
        ("metadata", Plan::new(json!({ "rules": rules })).patch(annotated_route)),
        ("ignored", Plan::new(json!({ "annotations": { "route": "ignore" } })).patch(annotated_route)),
        ("pass", header("pass")),
        ("strip", header("strip")),
        ("disabled", Plan::new(json!({})).patch(enabled_routes)),
    ]
});

fn named_route(config: EnvoyConfig) -> EnvoyConfig {
    config.route(Route::prefix("/by-name").named("by-name"))
}

fn annotated_route(config: EnvoyConfig) -> EnvoyConfig {
    let annotated = |path| Route::prefix(path).metadata(json!({ "locks": "order/1;wait=0, order/2;mode=shared" }));
    config.route(annotated("/annotated")).route(annotated("/items"))
}

fn enabled_routes(config: EnvoyConfig) -> EnvoyConfig {
    config.disabled().route(Route::prefix("/enabled").enabled()).route(Route::prefix("/sentinel").enabled())
}

/// The locks that a request is granted, as its caller and the upstream are told.
async fn granted(lane: &Lane, ask: Ask) -> Vec<String> {
    let before = lane.upstream().count();
    let answer = ask.send().await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let seen = &lane.upstream().requests()[before];
    assert_eq!(seen.header("lock-fence"), answer.header("lock-fence"));
    match answer.header("lock-fence") {
        None => {
            assert_eq!(answer.header("lock-status"), None);
            Vec::new()
        }
        fence => locks(fence),
    }
}

#[test]
fn rules_find_their_requests() {
    run(async {
        let lane = STAGE.lane("rules").await;
        let ask = |method: Method, path: &str, headers: &[(&str, &str)]| {
            let ask = Client::http1_fresh().ask(method, lane.url(path)).trace(1);
            headers.iter().fold(ask, |ask, (name, value)| ask.header(name, value))
        };
        let (get, post) = (Method::GET, Method::POST);
        let account: &[(&str, &str)] = &[("x-account", "77 & more")];
        for (method, path, headers, expected) in [
            (&post, "/orders/42/capture", account, &["account/77%20%26%20more shared", "order/42 exclusive"][..]),
            // Decoded once, and encoded again as a name is; the query is no part of the path.
            (&post, "/orders/%34%32/capture?x=/y", account, &["account/77%20%26%20more shared", "order/42 exclusive"]),
            (&post, "/orders/a%2Fb/capture", account, &["account/77%20%26%20more shared", "order/a%2Fb exclusive"]),
            (&get, "/orders/42/capture", account, &[]),
            (&post, "/orders/42/capture/", account, &[]),
            (&post, "/orders/42", account, &[]),
            (&get, "/items/7?kind=big%20one", &[], &["item/big%20one/GET/7 exclusive"]),
            (&post, "/items/7?a=b&kind=x", &[], &["item/x/POST/7 exclusive"]),
            // The first rule of those with the same path that fits.
            (&get, "/items/7?kind=x", &[("x-tier", "gold")], &["gold/7 exclusive"]),
            (&get, "/items/7?kind=x", &[("x-tier", "golden")], &["item/x/GET/7 exclusive"]),
            (&get, "/files/a/b%20c", &[], &["file/a%2Fb%20c exclusive"]),
            // Rules with a path go before those without.
            (&get, "/files/a", &[("x-tag", "t")], &["file/a exclusive"]),
            (&get, "/else", &[("x-tag", "t")], &["tag/t exclusive"]),
            (&get, "/by-name/1", &[], &["route/1 exclusive"]),
            (&get, "/else", &[], &[]),
            // Headers add to what the rule says, and the stronger mode counts.
            (
                &post,
                "/orders/1/capture",
                &[("x-account", "2"), ("lock", "account/2, order/3")],
                &["account/2 exclusive", "order/1 exclusive", "order/3 exclusive"],
            ),
        ] {
            assert_eq!(
                granted(&lane, ask(method.clone(), path, headers)).await,
                expected,
                "{method} {path} {headers:?}"
            );
        }
        lane.quiet().await;
    });
}

#[test]
fn routes_may_say_what_to_lock() {
    run(async {
        let lane = STAGE.lane("metadata").await;
        let metadata = ["order/1 exclusive", "order/2 shared"];
        assert_eq!(granted(&lane, lane.ask(1, "/annotated/x")).await, metadata);
        let with_header = lane.ask(1, "/annotated/x").header("lock", "order/2, order/3");
        let all = ["order/1 exclusive", "order/2 exclusive", "order/3 exclusive"];
        assert_eq!(granted(&lane, with_header).await, all);
        // Beside a rule for the same request.
        let all = ["item/x/GET/1 exclusive", "order/1 exclusive", "order/2 shared"];
        assert_eq!(granted(&lane, lane.ask(1, "/items/1?kind=x")).await, all);
        assert!(granted(&lane, lane.ask(1, "/else")).await.is_empty());
        // Its parameters count too: who does not wait is refused at once.
        let holder = lane.keep("/annotated", lane.ask(1, "/annotated?hold")).await;
        let refused = lane.ask(2, "/annotated/2").send().await.unwrap();
        assert_eq!(refused.status, 423);
        assert_eq!(refused.json()["holders"][0]["asked_by"], "route metadata");
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;

        let lane = STAGE.lane("ignored").await;
        assert!(granted(&lane, lane.ask(1, "/annotated/x")).await.is_empty());
        assert_eq!(granted(&lane, lane.ask(1, "/annotated/x").header("lock", "order/3")).await, ["order/3 exclusive"]);
        lane.quiet().await;
    });
}

#[test]
fn annotations_of_callers_may_be_passed_on_or_removed() {
    run(async {
        for (name, header) in [("pass", Some("order//1")), ("strip", None)] {
            let lane = STAGE.lane(name).await;
            // Unread, so nobody minds that it is wrong.
            let ask = lane.ask(1, "/unread").header("lock", "order//1");
            assert!(granted(&lane, ask).await.is_empty());
            assert_eq!(lane.upstream().requests_to("/unread")[0].header("lock").as_deref(), header);
            lane.quiet().await;
        }
    });
}

#[test]
fn the_filter_may_run_on_some_routes_only() {
    run(async {
        let lane = STAGE.lane("disabled").await;
        let lock = "order/1;wait=0";
        assert_eq!(granted(&lane, lane.ask(1, "/enabled/1").header("lock", lock)).await, ["order/1 exclusive"]);
        let holder = lane.keep("/enabled", lane.ask(1, "/enabled?hold").header("lock", lock)).await;
        assert_eq!(lane.ask(2, "/enabled/1").header("lock", lock).send().await.unwrap().status, 423);
        // Elsewhere it is not there.
        let untouched = lane.ask(2, "/elsewhere").header("lock", lock).header("lock-status", "x").send().await.unwrap();
        assert_eq!(untouched.status, 200);
        assert_eq!(untouched.header("lock-status"), None);
        let seen = &lane.upstream().requests_to("/elsewhere")[0];
        assert_eq!(seen.header("lock").as_deref(), Some(lock));
        assert_eq!(seen.header("lock-status").as_deref(), Some("x"));
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}
