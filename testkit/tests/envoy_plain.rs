//! The testkit against a real Envoy without Interlock: what the other tests stand on does what it says.

use std::time::Duration;

use interlock_testkit::config::Route;
use interlock_testkit::envoy::Update;
use interlock_testkit::{Client, DEADLINE, Ended, Envoy, EnvoyConfig, RawClient, Reply, Upstream, wait_for};
use serde_json::json;

async fn plain() -> (Upstream, Envoy) {
    let upstream = Upstream::start().await.unwrap();
    let envoy = Envoy::start(EnvoyConfig::plain().upstream(upstream.address())).await.unwrap();
    (upstream, envoy)
}

fn alive(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn serves_counts_and_logs() {
    let (upstream, envoy) = plain().await;
    let url = format!("{}/work?status=201&body=1000", envoy.base_url());
    for client in [Client::http1(), Client::http1_fresh(), Client::http2()] {
        let answer = client.post(&url).header("x-bytes", b"\x80\xff").body("in").send().await.unwrap();
        assert_eq!((answer.status, answer.body.len()), (201, 1000));
    }
    let seen = upstream.requests_to("/work");
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|r| r.headers["x-bytes"].as_bytes() == b"\x80\xff" && &r.body[..] == b"in"));
    assert!(seen.iter().all(|r| r.ended.is_some_and(|(how, _)| how == Ended::Answered)));
    envoy.wait_stat("http.plain.downstream_rq_2xx", |n| n == 3, DEADLINE).await;
    envoy
        .wait_metric(
            "envoy_http_downstream_rq_time_count",
            &[("envoy_http_conn_manager_prefix", "plain")],
            |n| n == 3.0,
            DEADLINE,
        )
        .await;
    wait_for("the access log", DEADLINE, || envoy.access_log().len() == 3).await;
    assert!(envoy.access_log().iter().all(|line| line["status"] == 201));
    assert!(envoy.memory().unwrap() > 1_000_000);
}

#[tokio::test]
async fn several_run_beside_each_other_and_end_with_their_values() {
    let (a, b) = tokio::join!(plain(), plain());
    assert_ne!(a.1.base_url(), b.1.base_url());
    assert_ne!(a.1.admin(), b.1.admin());
    let (dropped, stopped) = (a.1.pid(), b.1.pid());
    drop(a);
    b.1.stop().await.unwrap();
    assert!(!alive(dropped) && !alive(stopped));
}

#[tokio::test]
async fn a_start_that_fails_says_what_envoy_said() {
    let config = EnvoyConfig::plain().patch(|b| b["no_such_field"] = json!(1));
    let error = format!("{:#}", Envoy::start(config).await.unwrap_err());
    assert!(error.contains("no_such_field"), "{error}");
}

#[tokio::test]
async fn a_held_request_goes_on_when_opened_and_is_abandoned_when_the_client_leaves() {
    let (upstream, envoy) = plain().await;
    for client in [Client::http1(), Client::http2()] {
        let before = upstream.count() / 2;
        let stays = client.get(format!("{}/stays?hold", envoy.base_url())).spawn();
        let leaves = client.get(format!("{}/leaves?hold", envoy.base_url())).spawn();
        upstream.wait_for_requests("/stays", before + 1).await;
        upstream.wait_for_requests("/leaves", before + 1).await;
        assert_eq!(upstream.live(), 2);
        leaves.leave().await;
        wait_for("the client's leave to be seen", DEADLINE, || upstream.live() == 1).await;
        assert_eq!(upstream.requests_to("/leaves")[before].ended.unwrap().0, Ended::Abandoned);
        assert!(!stays.is_answered());
        upstream.open("/stays");
        assert_eq!(stays.answer().await.unwrap().status, 200);
        upstream.close("/stays");
    }
}

#[tokio::test]
async fn an_upstream_breaks_off_as_told() {
    let (upstream, envoy) = plain().await;
    let client = Client::http1();
    let before = client.get(format!("{}/?reset=before", envoy.base_url())).send().await.unwrap();
    assert_eq!(before.status, 503);
    client.get(format!("{}/?reset=after&body=1000", envoy.base_url())).send().await.unwrap_err();
    let stalled =
        client.get(format!("{}/?stall=300", envoy.base_url())).timeout(Duration::from_millis(100)).send().await;
    stalled.unwrap_err();
    upstream.wait_idle().await;
    assert_eq!(upstream.requests().last().unwrap().ended.unwrap().0, Ended::Abandoned);
}

#[tokio::test]
async fn grpc_goes_through_with_its_trailers() {
    let (_upstream, envoy) = plain().await;
    let answer = Client::http2().grpc(format!("{}/pkg.Service/Call?grpc=9", envoy.base_url())).send().await.unwrap();
    assert_eq!((answer.status, answer.grpc_status()), (200, Some(9)));
    assert_eq!(answer.trailers.len(), 1);
}

#[tokio::test]
async fn a_handler_answers_and_routes_have_timeouts() {
    let upstream =
        Upstream::with(|request| async move { Reply::new(202, request.bare_path().to_owned()).header("x-a", "b") });
    let upstream = upstream.await.unwrap();
    let slow = Upstream::start().await.unwrap();
    let config = EnvoyConfig::plain()
        .upstream(upstream.address())
        .cluster("slow", slow.address())
        .route(Route::prefix("/slow").cluster("slow").timeout("0.1s").named("slow"));
    let envoy = Envoy::start(config).await.unwrap();
    let answer = Client::http1().get(format!("{}/fast?x=1", envoy.base_url())).send().await.unwrap();
    assert_eq!((answer.status, answer.text().as_str(), answer.header("x-a").as_deref()), (202, "/fast", Some("b")));
    let late = Client::http1().get(format!("{}/slow?hold", envoy.base_url())).send().await.unwrap();
    assert_eq!(late.status, 504);
    slow.wait_idle().await;
}

#[tokio::test]
async fn raw_bytes_go_out_as_they_are() {
    let (upstream, envoy) = plain().await;
    let mut raw = RawClient::connect(envoy.address()).await.unwrap();
    raw.request("GET", "/raw?body=70000", &[("x-raw", b"\x80\xff"), ("x-raw", b"two")]).await.unwrap();
    let response = raw.response().await.unwrap();
    assert_eq!((response.status, response.body.len()), (200, 70000));
    raw.request("GET", "/raw?grpc=0", &[]).await.unwrap();
    assert_eq!(raw.response().await.unwrap().body.len(), 5);
    assert_eq!(upstream.requests_to("/raw")[0].headers.get_all("x-raw").iter().count(), 2);
    raw.send(b"no HTTP at all\r\n\r\n").await.unwrap();
    assert!(String::from_utf8_lossy(&raw.read_to_end().await.unwrap()).starts_with("HTTP/1.1 400"));

    let mut leaver = RawClient::connect(envoy.address()).await.unwrap();
    leaver.request("GET", "/left?hold", &[]).await.unwrap();
    upstream.wait_for_requests("/left", 1).await;
    leaver.reset().unwrap();
    upstream.wait_idle().await;
}

#[tokio::test]
async fn listeners_from_a_file_change_while_envoy_runs() {
    let upstream = Upstream::start().await.unwrap();
    let config = EnvoyConfig::plain().upstream(upstream.address()).listener_from_file();
    let mut envoy = Envoy::start(config).await.unwrap();
    let client = Client::http1_fresh();
    let url = format!("{}/x", envoy.base_url());
    assert_eq!(client.get(&url).send().await.unwrap().status, 200);
    let direct = json!({ "match": { "prefix": "/" }, "direct_response": { "status": 418 } });
    let taken = envoy.update_listeners(|listener| {
        let hcm = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
        hcm["route_config"]["virtual_hosts"][0]["routes"] = json!([direct]);
    });
    assert_eq!(taken.await.unwrap(), Update::Taken);
    assert_eq!(client.get(&url).send().await.unwrap().status, 418);
    let refused = envoy.update_listeners(|listener| {
        listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]["typed_config"]["@type"] =
            json!("type.googleapis.com/no.such.Filter");
    });
    assert_eq!(refused.await.unwrap(), Update::Refused);
    assert_eq!(client.get(&url).send().await.unwrap().status, 418);
    assert_eq!(envoy.update_listeners(|_| ()).await.unwrap(), Update::Taken);
}
