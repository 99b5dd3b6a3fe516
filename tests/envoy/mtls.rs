//! The lease API behind mTLS: an authority that asks for certificates, and an Envoy beside each caller that has one. Who may
//! lock what, and who may break a lock, goes by the SPIFFE ID in the caller's certificate.
//!
//! All certificates are made here, for one test each.

use std::collections::BTreeMap;

use hyper::Method;
use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, Client, DEADLINE, Envoy, EnvoyConfig, Upstream, tools, wait_for_async};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use serde_json::{Value, json};

use crate::world::log_lines;

const AUTHORITY: &str = "spiffe://mesh/ns/locks/sa/authority";
const PAY: &str = "spiffe://mesh/ns/pay/sa/api";
const SHOP: &str = "spiffe://mesh/ns/shop/sa/cart";
const ONCALL: &str = "spiffe://mesh/ns/ops/sa/oncall";

const TOKEN: &str = "0123456789abcdef";
const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";

/// Who signs certificates.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A certificate whose subject is its issuer's is taken for one that signed itself.
        params.distinguished_name.push(DnType::CommonName, "the mesh");
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for the workload of this SPIFFE ID with its key, as Envoy takes them.
    fn certificate(&self, id: &str) -> Value {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        json!({
            "certificate_chain": { "inline_string": certificate.pem() },
            "private_key": { "inline_string": key.serialize_pem() },
        })
    }

    /// Trust in what this one has signed.
    fn trusted(&self) -> Value {
        json!({ "trusted_ca": { "inline_string": self.0.pem() } })
    }
}

/// An authority behind mTLS, and an Envoy with a listener for each identity that calls it.
struct Mesh {
    ca: Ca,
    authority: Envoy,
    callers: Envoy,
}

/// Callers without a certificate of the mesh: one has none at all, one a certificate that another CA has signed.
const NOBODY: &str = "nobody";
const STRANGER: &str = "stranger";

fn policy() -> Value {
    json!({
        "instance": "authority",
        "defaults": { "wait": "20s", "ttl": "1s", "hold": "120s" },
        "limits": { "max_ttl": "1s" },
        "classes": [
            { "name": "payment", "principals": ["spiffe://mesh/ns/pay/*"] },
            { "name": "cart", "principals": [SHOP] },
            { "name": "order" },
        ],
        "keys": [{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }],
        "api": { "admin": { "principals": [ONCALL], "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } } },
    })
}

impl Mesh {
    async fn start() -> Self {
        let ca = Ca::new();
        let downstream = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": format!("{TLS}.DownstreamTlsContext"),
                "require_client_certificate": true,
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_certificates": [ca.certificate(AUTHORITY)],
                    "validation_context": ca.trusted(),
                },
            },
        });
        let config = EnvoyConfig::from_file(&tools::root().join("envoy/authority.yaml")).unwrap().policy(policy());
        let config = config.patch(|bootstrap| {
            bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] = downstream;
        });
        let authority = Envoy::start(config).await.unwrap();
        let identities = [PAY, SHOP, ONCALL].map(|id| (id, Some(ca.certificate(id))));
        let others = [(NOBODY, None), (STRANGER, Some(Ca::new().certificate(PAY)))];
        let callers = identities.into_iter().chain(others).collect();
        let callers = Envoy::start(callers_of(&authority, &ca, callers)).await.unwrap();
        let mesh = Mesh { ca, authority, callers };
        wait_for_async("the end of the grace", DEADLINE, async || {
            mesh.call(PAY, Method::GET, "health").send().await.unwrap().status == 200
        })
        .await;
        mesh
    }

    fn call(&self, caller: &str, method: Method, path: &str) -> Ask {
        let address = self.callers.listener(caller).unwrap();
        Client::http1_fresh().ask(method, format!("http://{address}/interlock/v1/{path}"))
    }

    fn put(&self, caller: &str, id: &str, owner: &str, lock: &str) -> Ask {
        let body = json!({ "owner": owner, "locks": [{ "name": lock }] });
        self.call(caller, Method::PUT, &format!("leases/{id}")).body(body.to_string())
    }

    async fn release(&self, caller: &str, id: &str) {
        let answer = self.call(caller, Method::DELETE, &format!("leases/{id}")).send().await.unwrap();
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!("released")));
    }

    /// How many handshakes the authority has ended for this reason.
    async fn failed(&self, reason: &str) -> u64 {
        let name = format!(".ssl.{reason}");
        let stats = self.authority.stats().await.unwrap();
        stats.iter().filter(|(stat, _)| stat.starts_with("listener.") && stat.ends_with(&name)).map(|(_, n)| n).sum()
    }
}

/// The transport of a cluster: to the authority and to nobody else, with the certificate of a caller.
fn upstream_tls(ca: &Ca, certificate: Option<&Value>) -> Value {
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": format!("{TLS}.UpstreamTlsContext"),
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificates": certificate.into_iter().collect::<Vec<_>>(),
                "validation_context": {
                    "trusted_ca": ca.trusted()["trusted_ca"],
                    "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": AUTHORITY } }],
                },
            },
        },
    })
}

/// The sidecars of all callers in one process: a listener each, which passes everything on to the authority with the
/// certificate of its caller.
fn callers_of(authority: &Envoy, ca: &Ca, callers: BTreeMap<&str, Option<Value>>) -> EnvoyConfig {
    let mut config = EnvoyConfig::plain();
    for name in callers.keys() {
        config = config.cluster(name, authority.address());
    }
    config.concurrency(1).patch(|bootstrap| {
        let resources = &mut bootstrap["static_resources"];
        let plain = resources["listeners"][0].take();
        let listener = |name: &str| {
            let mut listener = plain.clone();
            listener["name"] = json!(name);
            let hcm = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
            hcm["route_config"]["virtual_hosts"][0]["routes"] =
                json!([{ "match": { "prefix": "/" }, "route": { "cluster": name, "timeout": "0s" } }]);
            listener
        };
        resources["listeners"] = callers.keys().map(|name| listener(name)).collect();
        for cluster in resources["clusters"].as_array_mut().unwrap() {
            let certificate = callers[cluster["name"].as_str().unwrap()].as_ref();
            cluster["transport_socket"] = upstream_tls(ca, certificate);
            let options = &mut cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
            options.as_object_mut().unwrap().remove("use_downstream_protocol_config");
            options["explicit_http_config"] = json!({ "http2_protocol_options": {} });
        }
    })
}

fn slug(answer: &Answer) -> String {
    answer.json()["type"].as_str().unwrap().replace("urn:interlock:problem:", "")
}

#[tokio::test]
async fn a_caller_may_lock_what_its_identity_may() {
    let mesh = Mesh::start().await;
    for (caller, own, other, class) in [
        (PAY, "payment/1", "cart/1", "cart"),
        (SHOP, "cart/1", "payment/1", "payment"),
        (ONCALL, "order/9", "cart/1", "cart"),
    ] {
        let id = format!("lease-of-its-{}", own.replace('/', "-"));
        let granted = mesh.put(caller, &id, "one", own).send().await.unwrap();
        assert_eq!(granted.status, 201, "{caller}, {own}: {}", granted.text());
        let lock = mesh.call(caller, Method::GET, &format!("locks/{own}")).send().await.unwrap().json();
        assert_eq!(lock["holders"][0]["asked_by"], caller, "{lock}");

        let refused = mesh.put(caller, "lease-of-others-class", "two", other).send().await.unwrap();
        assert_eq!((refused.status, slug(&refused).as_str()), (403, "forbidden"), "{}", refused.text());
        let problem = refused.json();
        assert_eq!(problem["detail"], format!("{caller} may not lock class {class}"));
        assert_eq!((&problem["lock"], &problem["owner"]), (&json!(other), &json!("two")));
        let lock = mesh.call(caller, Method::GET, &format!("locks/{other}")).send().await.unwrap().json();
        assert_eq!(lock["holders"], json!([]), "{lock}");
        let line = log_lines(&mesh.authority, "refused").pop().unwrap();
        assert_eq!((&line["reason"], &line["asked_by"]), (&json!("forbidden"), &json!(caller)), "{line}");
        mesh.release(caller, &id).await;
    }
}

#[tokio::test]
async fn the_table_tells_which_workload_holds_and_which_waits() {
    let mesh = Mesh::start().await;
    let granted = mesh.put(PAY, "lease-of-the-payer", "payer", "order/1").send().await.unwrap();
    assert_eq!(granted.status, 201, "{}", granted.text());
    let waiter = mesh.put(SHOP, "lease-of-the-shopper", "shopper", "order/1").spawn();
    // The holder lives by its renewals, and any caller may look.
    let renewal = json!({ "leases": [{ "id": "lease-of-the-payer" }] }).to_string();
    let mut lock = Value::Null;
    wait_for_async("one that waits", DEADLINE, async || {
        let renewed = mesh.call(PAY, Method::POST, "leases/renew").body(renewal.clone()).send().await.unwrap();
        assert_eq!(renewed.json()["results"][0]["status"], "renewed");
        lock = mesh.call(ONCALL, Method::GET, "locks/order/1").send().await.unwrap().json();
        !lock["waiters"].as_array().unwrap().is_empty()
    })
    .await;
    let who = |entry: &Value| (entry["owner"].clone(), entry["asked_by"].clone());
    assert_eq!(who(&lock["holders"][0]), (json!("payer"), json!(PAY)), "{lock}");
    assert_eq!(who(&lock["waiters"][0]), (json!("shopper"), json!(SHOP)), "{lock}");
    mesh.release(PAY, "lease-of-the-payer").await;
    assert_eq!(waiter.answer().await.unwrap().status, 201);
    mesh.release(SHOP, "lease-of-the-shopper").await;
}

#[tokio::test]
async fn an_administrator_is_known_by_its_identity_or_by_the_token() {
    let mesh = Mesh::start().await;
    let broken = |answer: &Answer| answer.json()["ended"][0]["owner"].clone();
    let held = async |id: &str| {
        let granted = mesh.put(PAY, id, "one", "payment/1").send().await.unwrap();
        assert_eq!(granted.status, 201, "{}", granted.text());
    };
    held("lease-to-be-broken-1").await;
    for caller in [PAY, SHOP] {
        let refused = mesh.call(caller, Method::DELETE, "locks/payment/1").send().await.unwrap();
        assert_eq!((refused.status, slug(&refused).as_str()), (403, "forbidden"), "{caller}");
    }
    let by_identity = mesh.call(ONCALL, Method::DELETE, "locks/payment/1").send().await.unwrap();
    assert_eq!((by_identity.status, broken(&by_identity)), (200, json!("one")));
    held("lease-to-be-broken-2").await;
    let with = |token: &str| {
        mesh.call(SHOP, Method::DELETE, "locks/payment/1").header("authorization", format!("Bearer {token}"))
    };
    assert_eq!(with("fedcba9876543210").send().await.unwrap().status, 403);
    let by_token = with(TOKEN).send().await.unwrap();
    assert_eq!((by_token.status, broken(&by_token)), (200, json!("one")));
}

#[tokio::test]
async fn a_sidecar_asks_by_its_own_identity() {
    let mesh = Mesh::start().await;
    let upstream = Upstream::start().await.unwrap();
    let config = EnvoyConfig::from_file(&tools::root().join("envoy/sidecar.yaml")).unwrap();
    let config = config.cluster("app", upstream.address()).cluster("interlock-authority", mesh.authority.address());
    let sidecar = config.patch(|bootstrap| {
        let clusters = bootstrap["static_resources"]["clusters"].as_array_mut().unwrap();
        let authority = clusters.iter_mut().find(|cluster| cluster["name"] == "interlock-authority").unwrap();
        authority["transport_socket"] = upstream_tls(&mesh.ca, Some(&mesh.ca.certificate(PAY)));
    });
    let sidecar = Envoy::start(sidecar).await.unwrap();
    let ask = |owner, path: &str, lock: &str| {
        Client::http1_fresh().get(format!("{}{path}", sidecar.base_url())).trace(owner).header("lock", lock)
    };
    let holder = ask(1, "/pays?hold", "payment/1").spawn();
    upstream.wait_for_requests("/pays", 1).await;
    let lock = mesh.call(ONCALL, Method::GET, "locks/payment/1").send().await.unwrap().json();
    let asked_by = lock["holders"][0]["asked_by"].as_str().unwrap();
    assert!(asked_by.contains(PAY) && asked_by.contains("lock header"), "the workload, and why: {asked_by}");
    upstream.open("/pays");
    assert_eq!(holder.answer().await.unwrap().status, 200);

    // Its caller is told what the authority told the sidecar.
    let refused = ask(2, "/shops", "cart/1").send().await.unwrap();
    assert_eq!((refused.status, slug(&refused).as_str()), (403, "forbidden"), "{}", refused.text());
    assert_eq!(refused.json()["detail"], format!("{PAY} may not lock class cart"));
    assert!(upstream.requests_to("/shops").is_empty());
}

#[tokio::test]
async fn without_a_certificate_of_the_mesh_nobody_comes_as_far_as_the_api() {
    let mesh = Mesh::start().await;
    let served = mesh.authority.stat("http.authority.downstream_rq_total").await.unwrap();
    for (caller, reason) in [(NOBODY, "fail_verify_no_cert"), (STRANGER, "fail_verify_error")] {
        assert_eq!(mesh.failed(reason).await, 0);
        let call = mesh.call(caller, Method::GET, "health").header("authorization", format!("Bearer {TOKEN}"));
        let answer = call.send().await.unwrap();
        // The Envoy beside the caller says so: it has no connection.
        assert_eq!(answer.status, 503, "{caller}: {}", answer.text());
        assert!(mesh.failed(reason).await > 0, "{caller}");
    }
    let plain = Client::http1_fresh().get(format!("http://{}/interlock/v1/health", mesh.authority.address()));
    assert!(plain.send().await.is_err(), "it speaks nothing but TLS");
    assert_eq!(mesh.authority.stat("http.authority.downstream_rq_total").await.unwrap(), served);
}
