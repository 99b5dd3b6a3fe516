//! Checks manifests before a cluster gets them: `cargo xtask manifests FILE…`.

use std::path::PathBuf;
use std::process::ExitCode;

use interlock::policy::Policy;
use interlock_manifests::{Document, check, documents, policies};

/// Long enough for any secret: what the variables hold is not known here.
const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn main() -> ExitCode {
    let mut failed = false;
    for file in std::env::args_os().skip(1).map(PathBuf::from) {
        match documents(&file) {
            Ok(documents) => documents.iter().for_each(|document| failed |= !report(document)),
            Err(error) => {
                eprintln!("{error}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}

/// Says what is wrong with a document, or what it is; whether it is right.
fn report(document: &Document) -> bool {
    let Document { file, value } = document;
    let text = |field: &str| value.pointer(field).and_then(|text| text.as_str()).unwrap_or("?");
    let what = format!("{file}: {} {}", text("/kind"), text("/metadata/name"));
    let of_policies = || {
        let policies = policies(value)?;
        let parsed =
            policies.iter().map(|policy| Policy::parse(policy.to_string().as_bytes(), &|_| Some(SECRET.into())));
        parsed.collect::<Result<Vec<_>, _>>().map_err(|error| format!("the policy is refused: {error}"))
    };
    match check(value).and_then(|()| of_policies()) {
        Ok(policies) => {
            println!("{what}: right{}", if policies.is_empty() { "" } else { ", and its policy" });
            true
        }
        Err(error) => {
            eprintln!("{what}: {error}");
            false
        }
    }
}
