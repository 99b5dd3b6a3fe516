//! What a test asks of the bootstrap is where Envoy will look for it.

use interlock_testkit::{EnvoyConfig, Route};
use serde_json::{Value, json};

const HCM: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";

fn hcm(config: &EnvoyConfig) -> &Value {
    config.bootstrap().pointer(HCM).unwrap()
}

fn filters(config: &EnvoyConfig) -> Vec<&str> {
    hcm(config)["http_filters"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect()
}

fn plugin(config: &EnvoyConfig) -> &Value {
    let filters = hcm(config)["http_filters"].as_array().unwrap();
    &filters.iter().find(|f| f["name"] == "interlock").unwrap()["typed_config"]["config"]
}

#[test]
fn the_bootstrap_that_ships_has_what_the_patches_look_for() {
    let config = EnvoyConfig::local();
    assert!(filters(&config).starts_with(&["interlock"]));
    assert_eq!(plugin(&config)["failure_policy"], "FAIL_RELOAD");
    assert_eq!(plugin(&config)["vm_config"]["code"]["local"]["filename"], "dist/interlock.wasm");
    assert_eq!(hcm(&config)["access_log"][0]["name"], "envoy.access_loggers.stdout");
    assert!(filters(&config.without_interlock()).iter().all(|name| *name != "interlock"));
}

#[test]
fn the_policy_is_replaced_or_patched_in_the_type_it_has() {
    let text =
        EnvoyConfig::local().policy(json!({ "instance": "a" })).patch_policy(|p| p["enforcement"] = json!("off"));
    let policy: Value = serde_json::from_str(plugin(&text)["configuration"]["value"].as_str().unwrap()).unwrap();
    assert_eq!(policy, json!({ "instance": "a", "enforcement": "off" }));
    let structured = EnvoyConfig::local().policy_struct(json!({ "instance": "a" })).patch_policy(|p| p["x"] = json!(1));
    assert_eq!(plugin(&structured)["configuration"]["value"], json!({ "instance": "a", "x": 1 }));
    let broken = EnvoyConfig::local().policy_text("{").vm_id("other");
    assert_eq!(plugin(&broken)["configuration"]["value"], "{");
    assert_eq!(plugin(&broken)["vm_config"]["vm_id"], "other");
}

#[test]
fn routes_clusters_and_filters_go_where_they_belong() {
    let address = ([127, 0, 0, 1], 4242).into();
    let config = EnvoyConfig::local()
        .upstream(address)
        .cluster("accounts", address)
        .route(Route::path("/b").cluster("accounts").timeout("1s").enabled().metadata(json!({ "locks": "a/1" })))
        .filter_before(json!({ "name": "before" }))
        .filter_after(json!({ "name": "after" }))
        .disabled();
    assert_eq!(&filters(&config)[..3], ["before", "interlock", "after"]);
    assert_eq!(hcm(&config)["http_filters"][1]["disabled"], true);
    let routes = hcm(&config)["route_config"]["virtual_hosts"][0]["routes"].as_array().unwrap();
    assert_eq!(routes.len(), 2);
    assert_eq!(routes[0]["metadata"]["filter_metadata"]["interlock"]["locks"], "a/1");
    assert!(routes[0]["typed_per_filter_config"]["interlock"]["@type"].as_str().unwrap().ends_with("FilterConfig"));
    assert_eq!(routes[1]["route"]["cluster"], "upstream");
    let clusters = config.bootstrap()["static_resources"]["clusters"].as_array().unwrap();
    let port = |name| {
        let cluster = clusters.iter().find(|c| c["name"] == name).unwrap();
        &cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"]
    };
    assert_eq!((port("accounts"), port("upstream")), (&json!(4242), &json!(4242)));
}
