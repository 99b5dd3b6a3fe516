//! Requests with a `lock-fence` header.

use interlock::answer::headers::{FenceMember, lock_fence};
use interlock_core::{Fence, LockName, Mode, OwnerId};
use interlock_fuzz::host::UNIX_MS;
use interlock_fuzz::lock_fence::{EXPIRY, sign};

use crate::Seeds;

const WRITTEN: [&str; 32] = [
    "order/42;fence=176000000012345;mode=exclusive, stock/7;fence=176000000012346;mode=shared",
    "\"1/2\";fence=1;mode=shared",
    "a;fence=0;mode=intent-shared",
    "a;fence=999999999999999;mode=shared-intent-exclusive",
    "a;fence=1000000000000000;mode=shared",
    "a;mode=shared",
    "a;fence=1",
    "a;fence=-1;mode=shared",
    "a;fence=1.5;mode=shared",
    "a;fence=x;mode=shared",
    "a;fence=1;mode=x",
    "a;fence=1;mode=\"shared\"",
    "a;fence=1;mode=1",
    "a;fence=1;mode=shared;sig=x",
    "a;fence=1;mode=shared;sig=::",
    "a;fence=1;mode=shared;sig=:AP8H:",
    "a;fence=1;mode=shared;sig=:AP8:",
    "a;fence=1;mode=shared;sig=:AA:",
    "a;fence=1;mode=shared;sig=:AQA=:",
    "a;fence=1;mode=shared;sig=:Af8=:",
    "a;fence=1;fence=2;mode=shared;mode=exclusive",
    "a;fence=1;mode=shared, a;fence=1;mode=shared",
    "a;fence=1;mode=shared;new=1;other",
    "a//b;fence=1;mode=shared",
    "(a);fence=1;mode=shared",
    "1",
    "\u{fc}",
    "a;fence=1;mode=shared,",
    "",
    ",",
    "a;fence=1;mode=shared;sig=:AQNuZXcAAAGgxLUwAA==:",
    "a;fence=@1;mode=shared",
];

const OWNERS: [(&str, &str); 4] = [
    ("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n", "4bf92f3577b34da6a3ce929d0e0e4736"),
    ("x-request-id: r-1\n", "r-1"),
    ("lock-owner: a b\n", "a%20b"),
    ("baggage: lock-owner=x%2fy\n", "x/y"),
];

/// The seeds of the target.
pub fn seeds() -> Seeds {
    let mut seeds = Seeds::default();
    for header in WRITTEN {
        seeds.add("written", format!("lock-fence: {header}\nlock-owner: a\n"));
        seeds
            .add("beside", format!("lock-fence: order/1;fence=1;mode=shared\nlock-fence: {header}\nx-request-id: r\n"));
    }
    let mut signed = 0u8;
    for (header, owner) in OWNERS {
        let owner = OwnerId::new(owner).expect("an owner");
        for key in [0, 1] {
            for (lock, fence, expiry) in
                [("order/42", 176_000_000_012_345, EXPIRY), ("a@b/%2F", 1, UNIX_MS + 1), ("stock/7", 7, UNIX_MS)]
            {
                let name = LockName::parse(lock).expect("a name");
                let mut member = FenceMember { name, fence: Fence(fence), mode: Mode::Exclusive, sig: None };
                member.sig = Some(sign(&member, &owner, key, expiry));
                let mut forged = member.clone();
                forged.name = LockName::parse("order/43").expect("a name");
                let one = lock_fence(std::slice::from_ref(&member)).expect("a member");
                let both = lock_fence(&[forged, member]).expect("members");
                signed = signed.wrapping_add(37);
                let flip = [b"%flip: ".as_slice(), &[signed, 0x41], b"\n"].concat();
                seeds.add("signed", [format!("lock-fence: {one}\n{header}").into_bytes(), flip].concat());
                seeds.add("forged", format!("lock-fence: {both}\n{header}"));
                seeds.add("foreign", format!("lock-fence: {one}\nlock-owner: someone\n"));
            }
        }
    }
    let member = "a;fence=1;mode=shared, ";
    seeds.add("many", format!("lock-fence: {}b;fence=2;mode=shared\nlock-owner: a\n", member.repeat(20)));
    seeds.add("many", format!("lock-fence: a;fence=1;mode=shared;sig=:{}:\nlock-owner: a\n", "AAAA".repeat(60)));
    seeds
}
