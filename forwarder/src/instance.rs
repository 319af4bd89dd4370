//! What an instance's name gives: its control socket, lock, pins and state file. Others must not be able to put
//! theirs in the place of ours, so each directory is checked before it is used.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::{
        fs::{
            DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
            PermissionsExt as _,
        },
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};

const RUN: &str = "/run/forwarder";
const STATE: &str = "/var/lib/forwarder";
const PINS: &str = "/sys/fs/bpf/forwarder";
/// The user of the service, whose directories its unit makes, and the group that may use the control socket.
pub const USER: &str = "forwarder";

/// Modes of directories that others may look into, and that nobody else may.
const OPEN: u32 = 0o755;
const CLOSED: u32 = 0o700;

/// How often the lock and a directory are tried, and the lock after which time.
const TRIES: u32 = 30;
const RETRY: Duration = Duration::from_millis(10);

/// A running or stopped instance, by its name.
#[derive(Clone, Debug)]
pub struct Instance {
    pub name: String,
    /// The control socket, if it is not where the name says.
    pub socket: Option<PathBuf>,
}

/// Held for as long as an instance runs, so that whether it does is not a matter of a file that anybody may remove.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
    path: PathBuf,
}

/// Whether a path leads to this very file.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |about: fs::Metadata| (about.dev(), about.ino());
    let found = fs::symlink_metadata(path).map(identity);
    let own = file.metadata().map(identity);
    matches!((found, own), (Ok(found), Ok(own)) if found == own)
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = self.path.parent().map(fs::remove_dir); // stays while another instance runs
    }
}

impl Instance {
    /// Where the control socket may be: the system's place first, then the user's own.
    fn directories() -> [PathBuf; 2] {
        let own = named_by("XDG_RUNTIME_DIR")
            .unwrap_or_else(std::env::temp_dir)
            .join(format!("forwarder-{}", nix::unistd::geteuid()));
        [PathBuf::from(RUN), own]
    }

    /// Makes the directory of the control socket and says where that is: under /run for root and for a service's user
    /// that owns it, else under the user's runtime directory.
    ///
    /// # Errors
    /// Neither can be used, with what is wrong with the last.
    pub fn make_socket_path(&self) -> Result<PathBuf> {
        if let Some(path) = &self.socket {
            return Ok(path.clone());
        }
        let [system, own] = Self::directories();
        let directory = match make_private(&system) {
            Ok(()) => system,
            Err(_) => make_private(&own).map(|()| own)?,
        };
        Ok(directory.join(format!("{}.sock", self.name)))
    }

    /// The control sockets that a client may trust: in a directory of root's, of a service's user, or of its own.
    pub fn socket_paths(&self) -> Vec<PathBuf> {
        match &self.socket {
            Some(path) => vec![path.clone()],
            None => self.files("sock"),
        }
    }

    /// Where a file of this instance may be, in directories that may be trusted.
    fn files(&self, extension: &str) -> Vec<PathBuf> {
        let [system, own] = Self::directories();
        let own = is_private(&own).is_ok().then_some(own);
        let file = format!("{}.{extension}", self.name);
        let trusted = std::iter::once(system).chain(own);
        trusted.map(|directory| directory.join(&file)).collect()
    }

    /// Takes the instance's name.
    ///
    /// # Errors
    /// Another process has it, or there is no place for the lock.
    pub fn lock(&self) -> Result<Lock> {
        let [system, own] = Self::directories();
        let directory = match make_private(&system) {
            Ok(()) => system,
            Err(_) => make_private(&own).map(|()| own)?,
        };
        let path = directory.join(format!("{}.lock", self.name));
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true);
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
        loop {
            let file = make_within(&directory, OPEN, || options.open(&path))
                .with_context(|| format!("open {}", path.display()))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    // One that ends just now has removed what was opened.
                    if is_at(&file, &path) {
                        return Ok(Lock { _file: file, path });
                    }
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                    "instance {} is already running; choose another name by --instance",
                    self.name
                ),
                Err((_, error)) => {
                    return Err(error).with_context(|| format!("lock {}", path.display()));
                }
            }
        }
    }

    /// The same, but waits a moment for who has it: a CNI plugin that takes something out of the state.
    ///
    /// # Errors
    /// As [`Instance::lock`].
    pub async fn lock_soon(&self) -> Result<Lock> {
        for _ in 0..TRIES {
            if let Ok(lock) = self.lock() {
                return Ok(lock);
            }
            tokio::time::sleep(RETRY).await;
        }
        self.lock()
    }

    /// Whether a process has the instance's name.
    pub fn is_running(&self) -> bool {
        let file = format!("{}.lock", self.name);
        let [system, own] = Self::directories();
        [system, own].iter().any(|directory| {
            let Ok(lock) = File::open(directory.join(&file)) else {
                return false;
            };
            let taken = Flock::lock(lock, FlockArg::LockSharedNonblock);
            matches!(taken, Err((_, nix::errno::Errno::EWOULDBLOCK)))
        })
    }

    /// Removes the socket and the lock of an instance that has ended. Returns whether there was a socket.
    pub fn remove_files(&self) -> bool {
        let mut removed = false;
        for path in self.socket_paths() {
            removed |= path.exists() && clear_socket(&path).is_ok();
        }
        for path in self.files("lock") {
            let _ = fs::remove_file(&path);
            let _ = path.parent().map(fs::remove_dir); // stays while another instance runs
        }
        removed
    }

    /// Makes this instance's directory under bpffs, whose names have no dots. Anybody may make directories in a bpffs, so
    /// the one above is made, or found to be ours.
    ///
    /// # Errors
    /// It is somebody else's.
    pub fn make_pins(&self) -> Result<PathBuf> {
        let pins = self.pins();
        make_within(Path::new(PINS), CLOSED, || match fs::create_dir(&pins) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        })?;
        Ok(pins)
    }

    /// The same directory, if there is one.
    ///
    /// # Errors
    /// The one above is somebody else's.
    pub fn find_pins(&self) -> Result<Option<PathBuf>> {
        let pins = self.pins();
        if !pins.exists() {
            return Ok(None);
        }
        is_private(Path::new(PINS)).map(|()| Some(pins))
    }

    fn pins(&self) -> PathBuf {
        Path::new(PINS).join(self.name.replace('.', "%"))
    }

    /// The file with what was published at run time.
    pub fn state(&self) -> PathBuf {
        let system = Path::new(STATE);
        // Not root of a user namespace, where the directory is the machine's.
        let may_be_ours =
            nix::unistd::geteuid().is_root() && !(system.exists() && in_user_namespace());
        let directory = if may_be_ours || is_private(system).is_ok() {
            PathBuf::from(STATE)
        } else {
            // Without the variable, what the system says of the user.
            let home = || std::env::home_dir().filter(|home| home.is_absolute());
            named_by("XDG_STATE_HOME")
                .unwrap_or_else(|| home().unwrap_or("/".into()).join(".local/state"))
                .join("forwarder")
        };
        directory.join(format!("{}.json", self.name))
    }
}

/// Whether this process is in a user namespace of its own: root of one is nobody in particular to the rest of the machine.
pub fn in_user_namespace() -> bool {
    /// `PROC_USER_INIT_INO` of include/linux/proc_ns.h.
    const FIRST: u64 = 0xEFFF_FFFD;
    fs::metadata("/proc/self/ns/user").is_ok_and(|it| it.ino() != FIRST)
}

/// The directory that a variable names. One that is relative has no meaning, as the XDG Base Directory Specification says: it would
/// be another wherever a command is typed.
fn named_by(variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    named.filter(|path| path.is_absolute())
}

/// Names of instances that do not run, and whose programs are pinned all the same.
///
/// # Errors
/// This process may not look.
pub fn left() -> Result<Vec<String>> {
    let pins = match fs::read_dir(PINS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        pins => pins.map_err(|error| anyhow!("{PINS}: {error}; run as root"))?,
    };
    let names = pins.flatten();
    let names = names.map(|it| it.file_name().to_string_lossy().replace('%', "."));
    let instances = names.map(|name| Instance { name, socket: None });
    let left = instances.filter(|instance| !instance.is_running());
    Ok(left.map(|instance| instance.name).collect())
}

/// Removes a socket that nobody listens at; on return the path is free.
///
/// # Errors
/// It is somebody's, or no socket.
pub fn clear_socket(path: &Path) -> Result<()> {
    let shown = path.display();
    let about = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        about => about.with_context(|| format!("look at {shown}"))?,
    };
    if !about.file_type().is_socket() {
        bail!("{shown} is no socket; choose another path by --socket");
    }
    if UnixStream::connect(path).is_ok() {
        bail!("another process serves {shown}; choose another path by --socket");
    }
    fs::remove_file(path).with_context(|| format!("remove {shown}"))
}

/// Makes a directory that others may look into and not write to, or finds that it is one.
///
/// # Errors
/// It cannot be made, or belongs to somebody else.
pub fn make_private(directory: &Path) -> Result<()> {
    make_within(directory, OPEN, || Ok(()))
}

/// Makes a private directory and at once what `make` makes in it. Again if the directory goes meanwhile: an instance that
/// ends removes what it leaves empty.
fn make_within<T>(directory: &Path, mode: u32, make: impl Fn() -> io::Result<T>) -> Result<T> {
    let mut tries = TRIES;
    loop {
        let made = make_with_mode(directory, mode).and_then(|()| Ok(make()?));
        let is_gone = |error: &anyhow::Error| {
            let io = error.downcast_ref::<io::Error>();
            io.is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        match made {
            Err(error) if is_gone(&error) && tries > 0 => tries -= 1,
            made => return made,
        }
    }
}

fn make_with_mode(directory: &Path, mode: u32) -> Result<()> {
    let made = DirBuilder::new().mode(mode).create(directory);
    match made {
        // Whatever the umask is.
        Ok(()) => fs::set_permissions(directory, Permissions::from_mode(mode))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = directory.parent().context("no parent")?;
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
            return make_with_mode(directory, mode);
        }
        Err(error) => return Err(error).with_context(|| format!("create {}", directory.display())),
    }
    is_private(directory)
}

/// Whether a directory, which is no link, is of this process's user, and only that user may write to it. Root takes the
/// service's user for its own, whose capabilities are hardly less.
///
/// # Errors
/// What is wrong with it.
pub fn is_private(directory: &Path) -> Result<()> {
    let about = fs::symlink_metadata(directory)
        .with_context(|| format!("look at {}", directory.display()))?;
    let shown = directory.display();
    if !about.is_dir() {
        bail!("{shown} is no directory; remove it");
    }
    let (owner, own) = (about.uid(), nix::unistd::geteuid());
    let is_the_services = || {
        let user = nix::unistd::User::from_name(USER).ok().flatten();
        user.is_some_and(|user| user.uid.as_raw() == owner)
    };
    if owner != own.as_raw() && !(own.is_root() && is_the_services()) {
        bail!("{shown} belongs to user {owner}, not to {own}; remove it");
    }
    if about.mode() & 0o022 != 0 {
        bail!("others may write to {shown}; `chmod go-w {shown}` would change that");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let directory = std::env::temp_dir().join(format!("forwarder-test-{}", std::process::id()));
        make_private(&directory).expect("a new directory");
        fs::set_permissions(&directory, Permissions::from_mode(0o777)).expect("chmod");
        let error = is_private(&directory).expect_err("it is open").to_string();
        assert!(error.contains("chmod go-w"), "{error}");
        let link = directory.with_extension("link");
        std::os::unix::fs::symlink(&directory, &link).expect("a link");
        let error = make_private(&link).expect_err("a link").to_string();
        assert!(error.contains("no directory"), "{error}");
        fs::remove_file(link)
            .and_then(|()| fs::remove_dir(directory))
            .expect("removed");
    }

    #[test]
    fn a_directory_that_others_remove_when_they_leave_it_empty_is_made_all_the_same() {
        let shared = std::env::temp_dir().join(format!("forwarder-shared-{}", std::process::id()));
        std::thread::scope(|scope| {
            for instance in ["a", "b", "c", "d"] {
                let own = shared.join(instance);
                let shared = &shared;
                scope.spawn(move || {
                    for _ in 0..2000 {
                        make_within(shared, CLOSED, || fs::create_dir(&own)).expect("made");
                        fs::remove_dir(&own).expect("its own");
                        let _ = fs::remove_dir(shared); // stays while another is in it
                    }
                });
            }
        });
    }

    #[test]
    fn bpffs_gets_no_dots() {
        let instance = Instance {
            name: "web.example".into(),
            socket: None,
        };
        assert_eq!(
            instance.pins(),
            Path::new("/sys/fs/bpf/forwarder/web%example")
        );
    }
}
