//! Lock names, values, and rules with requests.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::Seeds;

const NAMES: [&str; 40] = [
    "order",
    "order/42",
    "stock/a/b",
    "a.b_c~d:e@f-g/%25",
    "order/%34%32",
    "order/a%2fb",
    "order/a%2Fb",
    "order/%c3%bc",
    "order/%C3%BC",
    "%41",
    "%2f",
    "%2F/%2f",
    "order/%00",
    "order/%7e%7E~",
    "order/%",
    "order/%4",
    "order/%zz",
    "order/%4g",
    "order/%%",
    "order/%25%32%35",
    "order/%2525",
    "/",
    "//",
    "/a",
    "a/",
    "a//b",
    "a/./b",
    "a/../b",
    "a b",
    "a+b",
    "a?b",
    "a#b",
    "a{b}",
    "a\\b",
    "a\tb",
    "\u{fc}",
    "a/\u{1F512}",
    "A/B",
    "-/-/-",
    "1/2/3/4/5/6/7/8/9/10/11/12",
];

const VALUES: [&str; 14] = [
    "42",
    "",
    "/",
    "a/b",
    "../x",
    "%2f",
    "a b",
    "\u{fc}",
    "{id}",
    "a?b=c",
    "~",
    "\u{0}",
    "%",
    "spiffe://mesh/ns/a/sa/b",
];

/// A rule and a request for it: path, templates, the request.
const RULES: [(&str, &[&str], &str); 46] = [
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/42/capture\n:method: POST\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/%34%32/capture?x=1\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/4%2f2/capture\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders//capture\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/%/capture\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/%2534/capture#f\n"),
    ("/orders/{id}/capture", &["order/{id}"], ":path: /orders/a%/capture/\n"),
    ("/orders/{id}", &["order/{id}", "account/{header:x-account}"], ":path: /orders/1\nx-account: a/1 \u{fc}\n"),
    ("/orders/{id}", &["account/{header:X-Account}"], ":path: /orders/1\nx-account: \n"),
    ("/orders/{id}", &["account/{header:x-account}"], ":path: /orders/1\n"),
    ("/orders/{id}", &["q/{query:q}"], ":path: /orders/1?q=1+2&x=%33\n"),
    ("/orders/{id}", &["q/{query:q}"], ":path: /orders/1?q=1&%71=2\n"),
    ("/orders/{id}", &["q/{query:q}-{query:x}"], ":path: /orders/1?q=%2f&x=a%20b#&q=9\n"),
    ("/orders/{id}", &["q/{query:q}"], ":path: /orders/1?q\n"),
    ("/orders/{id}", &["q/{query:q}"], ":path: /orders/1?\n"),
    ("/orders/{id}", &["q/{query:a/b}"], ":path: /orders/1?a/b=1&a%2fb\n"),
    ("/orders/{id}", &["m/{method}/{id}"], ":path: /orders/1\n:method: M-SEARCH\n"),
    ("/orders/{id}", &["who/{principal}"], ":path: /orders/1\n%principal: spiffe://mesh/ns/a/sa/b\n"),
    ("/orders/{id}", &["who/{principal}"], ":path: /orders/1\n"),
    ("/files/{name}.pdf", &["file/{name}"], ":path: /files/a.pdf\n"),
    ("/files/{name}.pdf", &["file/{name}"], ":path: /files/.pdf\n"),
    ("/files/v{name}.pdf", &["file/x-{name}-y"], ":path: /files/v%61.pdf\n"),
    ("/tree/{*rest}", &["tree/{rest}"], ":path: /tree/a/b/c\n"),
    ("/tree/{*rest}", &["tree/{rest}"], ":path: /tree/\n"),
    ("/{a}/{b}/{c}", &["x/{a}/{b}/{c}", "x/{c}{b}{a}"], ":path: /1/2/3\n"),
    ("/{a}", &["x/{a}{a}{a}"], ":path: /aa\n"),
    ("/{{x}}/{id}", &["x/{id}"], ":path: /%7bx%7D/1\n"),
    ("/a%2fb/{id}", &["x/{id}"], ":path: /a%2Fb/1\n"),
    ("/a b/{id}", &["x/{id}"], ":path: /a%20b/1\n"),
    ("/\u{fc}/{id}", &["x/{id}"], ":path: /%C3%bc/1\n"),
    ("/", &["root"], ":path: /\n"),
    ("/a/", &["a/%34"], ":path: /a/\n"),
    ("/{id}", &["{id}"], ":path: /1\n"),
    ("/{id}", &["order-{id}/x"], ":path: /1\n"),
    ("/{id}", &["order/{id"], ":path: /1\n"),
    ("/{id}", &["order/{id}}"], ":path: /1\n"),
    ("/{id}", &["order/{idd}"], ":path: /1\n"),
    ("/{id}", &["order/{haeder:x}"], ":path: /1\n"),
    ("/{id}", &["order/{header:a b}"], ":path: /1\n"),
    ("/{id}", &["order/{query:}"], ":path: /1\n"),
    ("/{id}", &["order//{id}"], ":path: /1\n"),
    ("/{id}", &["order/%{id}"], ":path: /1\n"),
    ("/{id}", &["order/{header::path}"], ":path: /1%31\n"),
    ("/{id}/{id}", &["order/{id}"], ":path: /1/2\n"),
    ("/{method}", &["order/{method}"], ":path: /1\n"),
    ("/%zz", &["order"], ":path: /%zz\n"),
];

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    NAMES.iter().for_each(|name| seeds.add("name", format!("name: {name}\n")));
    VALUES.iter().for_each(|value| seeds.add("value", format!("value: {value}\n")));
    for length in [254, 255, 256, 257] {
        seeds.add("length", format!("name: a/{}\n", "x".repeat(length - 2)));
        seeds.add("length", format!("name: {}\n", "%41".repeat(length / 3)));
        seeds.add("length", format!("value: {}\n", " ".repeat(length / 3)));
        let header = "x".repeat(length - 2);
        seeds.add("length", format!("template: a/{{header:x}}\n:path: /\nx: {header}\n"));
    }
    seeds.add(
        "every-byte",
        [b"value: ".as_slice(), &(0..=255).filter(|byte| *byte != b'\n').collect::<Vec<u8>>()].concat(),
    );
    for byte in (0..=255u8).step_by(17).chain([b'{', b'}', b'%', b'/', 0x7f]) {
        seeds.add("byte", [b"name: a/".as_slice(), &[byte], b"\nvalue: ", &[byte, byte], b"\n"].concat());
        seeds.add("byte", [b"path: /o/{id}\ntemplate: o/{id}\n:path: /o/".as_slice(), &[byte], b"\n"].concat());
    }
    for (path, templates, request) in RULES {
        let templates: String = templates.iter().map(|template| format!("template: {template}\n")).collect();
        seeds.add("rule", format!("path: {path}\n{templates}{request}"));
        seeds.add("no-path", format!("{templates}{request}x: y\n"));
    }
    let locks = cases.iter().filter_map(|case| case["locks"].as_object()).flat_map(|locks| locks.keys());
    let locks: BTreeSet<&String> = locks.filter(|name| name.contains(|c: char| !c.is_ascii_alphanumeric())).collect();
    locks.into_iter().take(40).for_each(|name| seeds.add("case", format!("name: {name}\nvalue: {name}\n")));
    seeds
}
