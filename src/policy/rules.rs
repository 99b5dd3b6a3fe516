//! Rules, and whatever else is chosen by what a request looks like: which requests they match, and in what order. How they are
//! written in a policy must not live here.
//!
//! Precedence: of the rules for a request's method and those for any method, the ones with the most exact path come
//! first (as matchit has it: literal segments before captures, captures before a catch-all); rules of one path shape
//! are tried in their order; when the headers or the route of all of those say no, the next exact path has its turn;
//! rules without a path come last, in their order. The first rule that matches is the only one that acts.
//!
//! A trailing slash counts: `/a` and `/a/` are two paths.

use std::collections::{BTreeMap, BTreeSet};

use matchit::Router;

use super::path::{Pattern, normalize};
use super::reader::PolicyError;
use super::template::{FillError, Template};
use super::{Enforcement, OnLeaseLost, OnUnavailable};
use crate::annotation::Wanted;

/// What a rule asks of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// It is there.
    Present,
    /// It has this value.
    Is(String),
}

/// One lock of a rule. What is unsaid is left to the policy's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleLock {
    /// Its name.
    pub name: Template,
    /// The lock without its name: mode and times.
    pub(super) terms: RuleTerms,
}

/// The mode and the times of a rule's lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleTerms {
    pub(super) mode: Option<interlock_core::Mode>,
    pub(super) wait: Option<std::time::Duration>,
    pub(super) ttl: Option<std::time::Duration>,
    pub(super) hold: Option<std::time::Duration>,
}

/// What a request must look like; all of it.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    pub(super) methods: Option<BTreeSet<String>>,
    pub(super) path: Option<Pattern>,
    pub(super) headers: BTreeMap<String, Condition>,
    pub(super) route: Option<String>,
}

/// Something that is chosen by what a request looks like: a member of a list of the policy.
pub trait Chosen {
    /// The field of the policy that lists these.
    const LIST: &'static str;
    /// What one of them is called.
    const WORD: &'static str;

    /// The requests that it is for.
    fn conditions(&self) -> &Conditions;

    /// The lock names that it makes of a request.
    fn templates(&self) -> impl Iterator<Item = &Template>;

    /// Which one it is, for people to read, by its place in the list.
    fn place(&self, index: usize) -> String;
}

/// A rule: which requests take which locks.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name, for logs and metrics.
    pub name: String,
    /// What it locks.
    pub locks: Vec<RuleLock>,
    /// Whether it acts, for whom, only watches, or neither: its own word, else the policy's.
    pub enforcement: Enforcement,
    /// What becomes of a request whose lease is lost.
    pub on_lease_lost: OnLeaseLost,
    /// What becomes of a request when the backend does not answer: its own word, else the policy's.
    pub on_backend_unavailable: OnUnavailable,
    /// The requests that it is for.
    pub(super) when: Conditions,
}

impl Chosen for Rule {
    const LIST: &'static str = "rules";
    const WORD: &'static str = "rule";

    fn conditions(&self) -> &Conditions {
        &self.when
    }

    fn templates(&self) -> impl Iterator<Item = &Template> {
        self.locks.iter().map(|lock| &lock.name)
    }

    fn place(&self, index: usize) -> String {
        format!("rules[{index}] ({})", self.name)
    }
}

/// What is asked of a request, as far as it is needed: the closures are called for what a rule in question names.
#[derive(Clone, Copy)]
pub struct Lookup<'a> {
    /// The method.
    pub method: &'a [u8],
    /// The raw path with its query.
    pub path: &'a [u8],
    /// Reads a header by its lower-case name.
    pub header: &'a dyn Fn(&str) -> Option<Vec<u8>>,
    /// Reads the name of the route.
    pub route: &'a dyn Fn() -> Option<Vec<u8>>,
    /// Reads the caller's SPIFFE ID.
    pub principal: &'a dyn Fn() -> Option<Vec<u8>>,
}

/// The rule for a request.
#[derive(Clone, Debug)]
pub struct Match<'r, R = Rule> {
    /// The rule.
    pub rule: &'r R,
    pub(super) captures: Vec<String>,
}

impl Match<'_> {
    /// The locks that the rule asks for, in its order.
    ///
    /// # Errors
    /// The first name that the request does not fill.
    pub fn locks(&self, lookup: &Lookup<'_>) -> Result<Vec<Wanted>, FillError> {
        let wanted = |lock: &RuleLock| {
            let RuleTerms { mode, wait, ttl, hold } = lock.terms;
            Ok(Wanted { name: lock.name.fill(&self.captures, lookup)?, mode, wait, ttl, hold })
        };
        self.rule.locks.iter().map(wanted).collect()
    }
}

/// Rules of one path shape.
#[derive(Clone, Debug)]
struct Shape {
    /// Matches this shape alone.
    router: Router<()>,
    rules: Vec<usize>,
}

/// The rules that can match requests of one method.
#[derive(Clone, Debug, Default)]
struct Table {
    /// Finds the first shape that matches, without trying them one by one. None where a segment has a suffix:
    /// matchit 0.9 does not come back from one when the rest of the path does not match, and overlooks other shapes.
    router: Option<Router<usize>>,
    /// All shapes, the most exact first.
    shapes: Vec<Shape>,
    /// Rules without a path.
    pathless: Vec<usize>,
}

/// All rules of a policy, or all that are chosen like rules.
#[derive(Clone, Debug)]
pub struct Rules<R = Rule> {
    rules: Vec<R>,
    /// One table for each method that a rule names, with the rules for any method in it.
    by_method: BTreeMap<String, Table>,
    /// The table for all other methods.
    other: Table,
}

impl<R> Default for Rules<R> {
    fn default() -> Self {
        Rules { rules: Vec::new(), by_method: BTreeMap::new(), other: Table::default() }
    }
}

impl<R: Chosen> Rules<R> {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rules as written.
    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.rules.iter()
    }

    /// The rule for a request; see the head of this module for which that is.
    pub fn find(&self, lookup: &Lookup<'_>) -> Option<Match<'_, R>> {
        let method = std::str::from_utf8(lookup.method).unwrap_or_default();
        let table = self.by_method.get(method).unwrap_or(&self.other);
        let mut facts = Facts { lookup, headers: Vec::new(), route: None };
        if !table.shapes.is_empty() {
            let path = normalize(lookup.path);
            // No shape before the one that the router finds matches the path.
            let first = table.router.as_ref().map_or(0, |router| router.at(&path).map_or(usize::MAX, |hit| *hit.value));
            for shape in table.shapes.iter().skip(first) {
                if let Ok(hit) = shape.router.at(&path)
                    && let Some(rule) = self.first(&shape.rules, &mut facts)
                {
                    let captures = hit.params.iter().map(|(_, value)| value.to_owned()).collect();
                    return Some(Match { rule, captures });
                }
            }
        }
        self.first(&table.pathless, &mut facts).map(|rule| Match { rule, captures: Vec::new() })
    }

    fn first(&self, rules: &[usize], facts: &mut Facts<'_, '_>) -> Option<&R> {
        rules.iter().filter_map(|index| self.rules.get(*index)).find(|rule| facts.satisfy(rule.conditions()))
    }

    /// Puts rules in order.
    ///
    /// # Errors
    /// A path that is ambiguous beside an earlier one; a rule that no request can reach.
    pub(super) fn build(rules: Vec<R>) -> Result<Rules<R>, PolicyError> {
        refuse_unreachable(&rules)?;
        let methods: BTreeSet<&String> =
            rules.iter().flat_map(|rule| rule.conditions().methods.iter().flatten()).collect();
        let table = |method: Option<&String>| {
            let applies = |rule: &R| match (&rule.conditions().methods, method) {
                (None, _) => true,
                (Some(methods), Some(method)) => methods.contains(method),
                (Some(_), None) => false,
            };
            Table::build(&rules, applies)
        };
        let other = table(None)?;
        let by_method = methods
            .iter()
            .map(|method| Ok(((*method).clone(), table(Some(method))?)))
            .collect::<Result<_, PolicyError>>()?;
        Ok(Rules { rules, by_method, other })
    }
}

impl Table {
    fn build<R: Chosen>(rules: &[R], applies: impl Fn(&R) -> bool) -> Result<Table, PolicyError> {
        let mut table = Table::default();
        let mut shapes: Vec<(&Pattern, Vec<usize>)> = Vec::new();
        for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| applies(rule)) {
            match &rule.conditions().path {
                None => table.pathless.push(index),
                Some(pattern) => match shapes.iter_mut().find(|(shape, _)| shape.segments == pattern.segments) {
                    Some((_, same)) => same.push(index),
                    None => shapes.push((pattern, vec![index])),
                },
            }
        }
        let routes: Vec<_> = shapes.iter().map(|(pattern, same)| (pattern.route(), same.first().copied())).collect();
        refuse_ambiguous(rules, &routes)?;
        let mut order: Vec<usize> = (0..shapes.len()).collect();
        order.sort_by_key(|written| shapes.get(*written).map(|(pattern, _)| pattern.exactness()));
        if !shapes.iter().any(|(pattern, _)| pattern.has_suffix()) {
            let mut router = Router::new();
            // Whether matchit takes a route can hang on the order they come in: the one that was just tried.
            for (written, (route, rule)) in routes.iter().enumerate() {
                let cannot = |error| PolicyError::new(path_of::<R>(*rule), format!("is no path: {error}"));
                let exact = order.iter().position(|index| *index == written).unwrap_or_default();
                router.insert(route, exact).map_err(cannot)?;
            }
            table.router = Some(router);
        }
        for written in order {
            if let (Some((route, rule)), Some((_, same))) = (routes.get(written), shapes.get(written)) {
                let cannot = |error| PolicyError::new(path_of::<R>(*rule), format!("is no path: {error}"));
                let mut router = Router::new();
                router.insert(route, ()).map_err(cannot)?;
                table.shapes.push(Shape { router, rules: same.clone() });
            }
        }
        Ok(table)
    }
}

fn refuse_ambiguous<R: Chosen>(rules: &[R], routes: &[(String, Option<usize>)]) -> Result<(), PolicyError> {
    let mut all = Router::new();
    for (position, (route, rule)) in routes.iter().enumerate() {
        if all.insert(route, ()).is_ok() {
            continue;
        }
        let conflicts = |(earlier, _): &&(String, Option<usize>)| {
            let mut pair = Router::new();
            pair.insert(earlier, ()).is_ok() && pair.insert(route, ()).is_err()
        };
        let with = routes.iter().take(position).find(conflicts).and_then(|(_, rule)| *rule);
        let named = |index: usize| rules.get(index).map(|rule| format!("that of {}", rule.place(index)));
        let beside = with.and_then(named).unwrap_or_else(|| format!("those of earlier {}s", R::WORD));
        let problem = format!("is ambiguous beside {beside}; make one of them more exact, or give both one shape");
        return Err(PolicyError::new(path_of::<R>(*rule), problem));
    }
    Ok(())
}

fn path_of<R: Chosen>(rule: Option<usize>) -> String {
    format!("{}[{}].match.path", R::LIST, rule.unwrap_or_default())
}

/// Refuses a rule whose every request an earlier rule takes first.
fn refuse_unreachable<R: Chosen>(rules: &[R]) -> Result<(), PolicyError> {
    for (index, rule) in rules.iter().map(Chosen::conditions).enumerate() {
        let earlier = || {
            let all = rules.iter().map(Chosen::conditions).enumerate().take(index);
            all.filter(|(_, earlier)| earlier.takes_all_that(rule))
        };
        let taken_by = match &rule.methods {
            None => earlier().find(|(_, earlier)| earlier.methods.is_none()),
            Some(methods) => {
                let takers = methods.iter().map(|method| {
                    let of_method = |taker: &Conditions| taker.methods.as_ref().is_none_or(|all| all.contains(method));
                    earlier().find(|(_, taker)| of_method(taker))
                });
                takers.collect::<Option<Vec<_>>>().and_then(|takers| takers.into_iter().next())
            }
        };
        if let Some(taker) = taken_by.and_then(|(earlier, _)| rules.get(earlier).map(|taker| taker.place(earlier))) {
            let word = R::WORD;
            return Err(PolicyError::new(
                format!("{}[{index}].match", R::LIST),
                format!(
                    "no request reaches this {word}, because {taker} takes all that it matches; put it before that {word}, or take \
                     it out"
                ),
            ));
        }
    }
    Ok(())
}

impl Conditions {
    /// Whether, methods aside, they hold for every request that `other` holds for, and are asked at the same point.
    fn takes_all_that(&self, other: &Conditions) -> bool {
        let shape = |conditions: &Conditions| conditions.path.as_ref().map(|pattern| pattern.segments.clone());
        let implied = |(name, condition): (&String, &Condition)| {
            other.headers.get(name).is_some_and(|theirs| *condition == Condition::Present || condition == theirs)
        };
        shape(self) == shape(other)
            && (self.route.is_none() || self.route == other.route)
            && self.headers.iter().all(implied)
    }
}

/// What has been read of a request so far: each thing is read once, and only when a rule in question names it.
struct Facts<'l, 'a> {
    lookup: &'l Lookup<'a>,
    headers: Vec<(String, Option<Vec<u8>>)>,
    route: Option<Option<Vec<u8>>>,
}

impl Facts<'_, '_> {
    fn satisfy(&mut self, rule: &Conditions) -> bool {
        let headers = rule.headers.iter().all(|(name, condition)| match (condition, self.header(name)) {
            (_, None) => false,
            (Condition::Present, Some(_)) => true,
            (Condition::Is(wanted), Some(value)) => value == wanted.as_bytes(),
        });
        headers && rule.route.as_ref().is_none_or(|route| self.route() == Some(route.as_bytes()))
    }

    fn header(&mut self, name: &str) -> Option<&[u8]> {
        if !self.headers.iter().any(|(read, _)| read == name) {
            self.headers.push((name.to_owned(), (self.lookup.header)(name)));
        }
        self.headers.iter().find(|(read, _)| read == name).and_then(|(_, value)| value.as_deref())
    }

    fn route(&mut self) -> Option<&[u8]> {
        self.route.get_or_insert_with(self.lookup.route).as_deref()
    }
}
