//! What docs/openapi.json is made of: the calls' own descriptions, and what holds of all of them.

use axum::http::StatusCode;
use utoipa::{
    Modify, OpenApi,
    openapi::{
        ContentBuilder, Object, Ref, RefOr, ResponseBuilder, Schema,
        path::{Operation, PathItem},
        schema::{OneOfBuilder, SchemaType, Type},
    },
};

use super::*;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "forwarder",
        description = "The control socket of an instance: HTTP/1.1 on a unix socket. Errors are problems (RFC 9457)."
    ),
    servers((url = "/", description = "unix:/run/forwarder/default.sock")),
    paths(
        about, list, one, add, remove, replace, unpublish, want,
        remove_all, lease, flows, end_flows, bans::bans, bans::one, bans::ban, bans::set_bans,
        bans::ban_one, bans::unban_one, bans::unban, bans::unban_all, stats, events, trace,
        reload, metrics, description
    ),
    components(schemas(Problem)),
    modifiers(&EveryAnswer, &TextToo)
)]
struct Api;

/// Any call may be answered with a problem. OpenAPI 3.1 wants words for each answer.
struct EveryAnswer;

impl Modify for EveryAnswer {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        for operation in api.paths.paths.values_mut().flat_map(operations) {
            let answers = &mut operation.responses.responses;
            for (status, answer) in answers.iter_mut() {
                let status = status.parse::<StatusCode>().ok();
                let words = status.and_then(|status| status.canonical_reason());
                if let RefOr::T(answer) = answer {
                    answer.description = words.expect("a status").into();
                }
            }
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem")));
            let problem = ResponseBuilder::new()
                .description("What is wrong, and the remedy")
                .content("application/problem+json", content.build());
            answers.insert("default".into(), problem.build().into());
        }
    }
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem {
        get,
        put,
        post,
        delete,
        ..
    } = path;
    [get, put, post, delete].into_iter().flatten()
}

/// A publish may be asked for by its SPEC alone, and a rate by text with a unit.
struct TextToo;

impl Modify for TextToo {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let schemas = &mut api.components.as_mut().expect("components").schemas;
        for (name, example) in [("Rate", "1000/s"), ("Bandwidth", "100Mbit")] {
            let Some(RefOr::T(Schema::Object(number))) = schemas.get_mut(name) else {
                panic!("no {name}");
            };
            number.schema_type = SchemaType::from_iter([Type::Integer, Type::String]);
            let words = number.description.get_or_insert_default();
            *words +=
                &format!(" In requests also text such as `{example}`; answers have the number.");
        }
        let object = schemas.remove("Asked").expect("Asked");
        let spec = Object::builder()
            .schema_type(Type::String)
            .description(Some("A SPEC"));
        let asked = OneOfBuilder::new().item(spec).item(object);
        schemas.insert("Asked".into(), Schema::OneOf(asked.build()).into());
    }
}

#[test]
fn the_description_is_of_this_server() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let mut text = Api::openapi().to_pretty_json().expect("JSON");
    text.push('\n');
    if std::env::var_os("FORWARDER_RENEW").is_some() {
        std::fs::write(path, &text).expect("written");
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        there == text,
        "docs/openapi.json is out of date: `FORWARDER_RENEW=1 cargo test -p forwarder the_description` renews it"
    );
}

/// What OpenAPI 3.1 asks for, and programs that are made from it need.
#[test]
fn every_operation_has_a_name_of_its_own_and_words_for_each_answer() {
    let document = serde_json::to_value(Api::openapi()).expect("JSON");
    let paths = document["paths"].as_object().expect("paths");
    let mut names = std::collections::BTreeSet::new();
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().expect("operations") {
            let name = operation["operationId"].as_str().expect("a name");
            assert!(names.insert(name.to_owned()), "{name} stands twice");
            let answers = operation["responses"].as_object().expect("answers");
            let problem = &answers["default"]["content"];
            assert!(problem["application/problem+json"].is_object(), "{path}");
            for (status, answer) in answers {
                let words = answer["description"].as_str().unwrap_or_default();
                assert!(!words.is_empty(), "{method} {path} {status}");
            }
        }
    }
}
