//! The CNI plugin with the capability `portMappings`, chained after the one that makes the interface, as the reference's
//! `portmap` is. Its publishes belong to `cni:NETWORK/CONTAINERID/IFNAME`, so DEL needs nothing but those names.
//!
//! CNI specification 1.1.0, whose earlier versions from 0.3.0 on differ in what `prevResult` looks like.

mod config;
mod failure;

use std::{
    collections::BTreeSet,
    env,
    io::{ErrorKind, Read as _, Write as _},
    net::IpAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::{
    config::{Attachment, Config, VERSIONS},
    failure::{Code, Failure},
};
use super::request::{self, Answer};
use crate::{
    control::api::{Asked, Listed},
    instance::Instance,
    publish::{Owner, Spec, spec::Ports, state::State},
    stderr,
};

/// An instance that is just starting or stopping is asked again after this time.
const RETRY: Duration = Duration::from_millis(50);
/// For so long. Runtimes give a plugin a minute or more.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs as the plugin: `CNI_COMMAND` and the other variables say what is asked, standard input has the configuration.
pub fn run() -> ExitCode {
    let Ok(command) = env::var("CNI_COMMAND") else {
        stderr::line(format_args!(
            "forwarder-portmap {}: a CNI plugin, run by a container runtime; protocol versions {}",
            env!("CARGO_PKG_VERSION"),
            VERSIONS.join(", ")
        ));
        return ExitCode::SUCCESS;
    };
    let mut text = Vec::new();
    let read = std::io::stdin().read_to_end(&mut text);
    let config = read
        .map_err(|error| Failure::new(Code::Io, "read the configuration", &error))
        .and_then(|_| Config::parse(&text));
    let version = config.as_ref().map_or_else(
        |_| config::version_of(&text),
        |config| config.version.clone(),
    );
    let outcome = match command.as_str() {
        // Whoever looks whether the plugin is there has no configuration yet.
        "VERSION" => Ok(json!({"cniVersion": version, "supportedVersions": VERSIONS})),
        command => config.and_then(|config| serve(command, &config)),
    };
    let (answer, status) = match outcome {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(failure) => (failure.document(&version), ExitCode::FAILURE),
    };
    if !answer.is_null() {
        let _ = writeln!(std::io::stdout(), "{answer}"); // the runtime may have gone
    }
    status
}

/// What the command is answered with; `Null` for nothing.
fn serve(command: &str, config: &Config) -> Result<Value, Failure> {
    config.is_supported()?;
    let instance = Instance {
        name: config.instance()?,
        socket: None,
    };
    match command {
        "ADD" => {
            let attachment = Attachment::from_environment(config, true)?;
            config.notes().for_each(stderr::line);
            add(config, &attachment, &instance)
        }
        "CHECK" => {
            let attachment = Attachment::from_environment(config, true)?;
            check(config, &attachment, &instance).map(|()| Value::Null)
        }
        "DEL" => {
            let owner = Attachment::from_environment(config, false)?.owner;
            let request = || delete(&instance, &owner);
            remove(&instance, &request, &|other| *other == owner).map(|()| Value::Null)
        }
        "GC" => {
            let valid: BTreeSet<Owner> = config.valid_attachments()?;
            let prefix = format!("cni:{}/", config.name()?);
            let is_left =
                |owner: &Owner| owner.as_str().starts_with(&prefix) && !valid.contains(owner);
            let request = || delete_all(&instance, &is_left);
            remove(&instance, &request, &is_left).map(|()| Value::Null)
        }
        "STATUS" => status(&instance).map(|()| Value::Null),
        other => Err(Failure::new(
            Code::Environment,
            &format!("CNI_COMMAND: {other:?} is no command"),
            &"ADD, DEL, CHECK, GC, STATUS and VERSION are",
        )),
    }
}

fn not_running(instance: &Instance, code: Code) -> Failure {
    let name = &instance.name;
    Failure::new(
        code,
        &format!("instance {name} is not running"),
        &"start it by `forwarder run`",
    )
}

/// Asks the instance for a document; `None` while it is not running.
fn ask(
    instance: &Instance,
    method: &str,
    path: &str,
    body: &str,
) -> Result<Option<(u16, Value)>, Failure> {
    let Some(stream) = request::connect(instance) else {
        return Ok(None);
    };
    let answer = request::send(&stream, method, path, body, None).and_then(Answer::document);
    match answer {
        Ok((503, _)) => Ok(None), // it is ending
        Ok(answer) => Ok(Some(answer)),
        // It has ended before it answered.
        Err(error) if error.kind() != ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(Failure::new(
            Code::Again,
            &format!("instance {} does not answer", instance.name),
            &error,
        )),
    }
}

fn add(config: &Config, attachment: &Attachment, instance: &Instance) -> Result<Value, Failure> {
    let result = config.result()?;
    let wanted = config.wanted(attachment)?;
    if wanted.is_empty() {
        return Ok(result);
    }
    let asked = wanted.iter().map(|spec| Asked {
        spec: Some(spec.to_string()),
        ..Asked::default()
    });
    let asked: Vec<Asked> = asked.collect();
    let body = serde_json::to_string(&asked)
        .map_err(|error| Failure::new(Code::Config, "write the request", &error))?;
    let path = format!("/v1/owners/{}", attachment.owner);
    let answer = ask(instance, "PUT", &path, &body)?;
    let (status, answer) = answer.ok_or_else(|| not_running(instance, Code::Again))?;
    accepted(status, &answer)?;
    Ok(result)
}

/// # Errors
/// The instance refuses, in its own words.
fn accepted(status: u16, answer: &Value) -> Result<(), Failure> {
    if status < 300 {
        return Ok(());
    }
    let word = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    let code = match status {
        409 => Code::Taken,
        422 => Code::Config,
        _ => Code::Refused,
    };
    Err(Failure::new(code, &word("detail"), &word("remedy")))
}

fn check(config: &Config, attachment: &Attachment, instance: &Instance) -> Result<(), Failure> {
    config.result()?;
    let wanted: BTreeSet<String> = config.wanted(attachment)?.iter().map(text).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let rows = list(instance)?.ok_or_else(|| not_running(instance, Code::Again))?;
    let own = rows.iter().filter(|row| row.owner == attachment.owner);
    let served = own.filter(|row| row.reason_code.as_deref() != Some("waiting"));
    let served: BTreeSet<String> = served.filter_map(spec_of).map(|it| text(&it)).collect();
    let missing: Vec<&str> = wanted.difference(&served).map(String::as_str).collect();
    let extra: Vec<&str> = served.difference(&wanted).map(String::as_str).collect();
    if missing.is_empty() && extra.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Changed,
        &format!("{} is not published as it was asked for", attachment.owner),
        &format!("missing: {missing:?}, not asked for: {extra:?}"),
    ))
}

fn text(spec: &Spec) -> String {
    spec.to_string()
}

/// Everything that the instance has published; `None` while it is not running.
fn list(instance: &Instance) -> Result<Option<Vec<Listed>>, Failure> {
    let Some((status, rows)) = ask(instance, "GET", "/v1/publishes", "")? else {
        return Ok(None);
    };
    accepted(status, &rows)?;
    serde_json::from_value(rows)
        .map(Some)
        .map_err(|error| Failure::new(Code::Decode, "read the list of publishes", &error))
}

/// The publish that a row of the list is about.
fn spec_of(row: &Listed) -> Option<Spec> {
    let ports = |first, last| Ports { first, last };
    let (frontend, backend) = (&row.frontend, &row.backend);
    let address: IpAddr = backend.address?;
    Spec::new(
        (frontend.address, frontend.zone.clone()),
        ports(frontend.port, frontend.end_port),
        (address, backend.zone.clone()),
        ports(backend.port, backend.end_port),
        row.protocol,
    )
    .ok()
}

/// Takes back all that an owner has; `None` while the instance is not running.
fn delete(instance: &Instance, owner: &Owner) -> Result<Option<()>, Failure> {
    let Some((status, answer)) = ask(instance, "DELETE", &format!("/v1/owners/{owner}"), "")?
    else {
        return Ok(None);
    };
    accepted(status, &answer).map(Some)
}

/// The same with all owners that are meant.
fn delete_all(
    instance: &Instance,
    is_meant: &dyn Fn(&Owner) -> bool,
) -> Result<Option<()>, Failure> {
    let Some(rows) = list(instance)? else {
        return Ok(None);
    };
    let owners = rows.into_iter().map(|row| row.owner);
    let owners: BTreeSet<Owner> = owners.filter(|owner| is_meant(owner)).collect();
    for owner in &owners {
        if delete(instance, owner)?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(()))
}

/// Has the instance take back what `by_request` names, or takes it out of the state file while there is no instance.
fn remove(
    instance: &Instance,
    by_request: &dyn Fn() -> Result<Option<()>, Failure>,
    is_meant: &dyn Fn(&Owner) -> bool,
) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    while by_request()?.is_none() {
        // An instance has the lock while it runs, so none can start in between.
        match instance.lock() {
            Ok(_lock) => {
                let forgotten = State::forget(instance.state(), is_meant);
                return forgotten.map_err(|error| {
                    let what = "take the publishes out of the state file";
                    Failure::new(Code::Io, what, &format!("{error:#}"))
                });
            }
            Err(_) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(error) => {
                let name = &instance.name;
                let what = format!("instance {name} does not answer, and has its state locked");
                return Err(Failure::new(Code::Again, &what, &format!("{error:#}")));
            }
        }
    }
    Ok(())
}

/// # Errors
/// The instance could not serve an ADD.
fn status(instance: &Instance) -> Result<(), Failure> {
    match ask(instance, "GET", "/v1/stats", "") {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(not_running(instance, Code::Unavailable)),
        Err(failure) => Err(failure.with(Code::Unavailable)),
    }
}
