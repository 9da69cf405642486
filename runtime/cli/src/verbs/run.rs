//! `cloison run`: everything is checked and read that can be, then the container is made, then its VM is launched.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cloison_image::{Image, Progress, Root, RootFs, Store};
use cloison_net::files::check_hostname;
use cloison_sandbox::{
    BindOptions, Home, Id, Name, RawTerminal, Shared, Streams, VmSize, enter_private_namespace,
    signal_number,
};
use cloison_vmm::probe::Probed;
use cloison_vmm::{Chosen, Engine, EngineChoice, VmSpec, choose};
use oci_spec::runtime::Spec;

use crate::args::{Global, Run, TemplateArg};
use crate::attached::foreground_streams;
use crate::container::{Container, Record};
use crate::exit::Failed;
use crate::monitor::Monitor;
use crate::network::{Etc, Source};
use crate::profile::Profile;
use crate::spec::{
    Capabilities, ContainerPlan, ProcessPlan, SecurityOptions, command, environment, user_of,
};
use crate::values::Bytes;
use crate::verbs::runtime;
use crate::{detached, terminal};

/// What the command line and the image say, checked, before anything of the container exists.
struct Prepared {
    image: Image,
    record: Record,
    vm: VmSpec,
    args: Vec<String>,
    capabilities: Capabilities,
    security: SecurityOptions,
    probed: Option<Probed>,
}

/// Runs a container; the status is its own.
pub fn run(global: &Global, home: &Home, args: Run, began: u64) -> Result<u8, Failed> {
    let profile = args.profile.clone().map(|file| Profile::new(file, began));
    let mut profile = profile.transpose()?;
    let mut prepared = prepare(global, home, &args)?;
    if let Some(profile) = &mut profile {
        profile.front_end("reading the image");
    }
    if args.process.detach {
        let report = detached::split()?;
        // Whichever process is the last to do so waits for it; the first one has nothing else to do.
        return match report {
            detached::Side::Parent(report) => {
                drop(prepared.probed);
                report.relay()
            }
            detached::Side::Child(reporter) => {
                prepared.probed = None;
                let (streams, outputs) = detached::streams(&args.process)?;
                let made = make(home, &args, prepared, streams);
                reporter.supervise(made, outputs)
            }
        };
    }
    let streams = foreground_streams(&args.process)?;
    let mut monitor = make(home, &args, prepared, streams)?;
    if let Some(profile) = &mut profile {
        profile.front_end("making the container");
    }
    monitor.profile = profile;
    let raw = (args.process.tty && args.process.interactive)
        .then(RawTerminal::enter)
        .transpose()
        .map_err(anyhow::Error::from)?;
    let status = runtime()?.block_on(monitor.run(|_| Ok(())));
    drop(raw);
    if let Some(profile) = &mut monitor.profile {
        profile.report()?;
    }
    status
}

fn prepare(global: &Global, home: &Home, args: &Run) -> Result<Prepared> {
    if args.process.tty && args.process.interactive && !args.process.detach {
        terminal::require()?;
    }
    for volume in &args.volume {
        if !volume.source.exists() {
            bail!(
                "the volume source {} does not exist on this host: create it first",
                volume.source.display()
            );
        }
    }
    args.network.check()?;
    let capabilities = Capabilities::choose(&args.cap_add, &args.cap_drop)?;
    if let Some(hostname) = &args.hostname {
        check_hostname(hostname)?;
    }
    let security = SecurityOptions::read(&args.security_opt, &capabilities.names())?;
    let size = VmSize::for_limits(
        args.memory.map(|Bytes(limit)| limit),
        args.cpus.map(|cpus| cpus.0),
    )?
    .within_the_host();
    let Chosen {
        engine,
        reason,
        probed,
    } = choose(args.engine.into())?;
    if matches!(args.engine.into(), EngineChoice::Auto) && engine == Engine::Software {
        eprintln!("cloison: {reason}");
    }
    let id = Id::random().context("cannot make an ID")?;
    let parts = global.parts();
    let vm = VmSpec {
        id: id.to_string(),
        engine,
        memory_mib: size.memory_mib,
        // Where all memory has to be there from the start, one size of VM does for many limits. None can be raised.
        max_memory_mib: match engine {
            Engine::Kvm => size.memory_mib,
            Engine::Software => size.room(engine).memory_mib,
        },
        vcpus: size.vcpus,
        max_vcpus: size.vcpus,
        spare_nics: 0,
        awaits_nic: false,
        kernel: parts.kernel()?,
        initramfs: parts.initramfs()?,
        cmdline: String::new(),
        qemu: parts.qemu(),
        template: (args.template == TemplateArg::Auto).then(|| home.template()),
    };
    vm.validate()
        .context("cannot make a VM for this container")?;

    enter_private_namespace()?;
    let store = Store::open(home.data())?;
    let image = store.resolve(&args.image, &mut progress)?;
    let command = command(&image.config, args.entrypoint.as_deref(), &args.command)?;
    let stop_signal = match (args.stop_signal, &image.config.stop_signal) {
        (Some(number), _) => number,
        (None, Some(text)) => {
            signal_number(text).context("the image's stop signal makes no sense")?
        }
        (None, None) => nix::libc::SIGTERM,
    };

    let name = match &args.name {
        Some(name) => name.clone(),
        None => id.short().parse::<Name>()?,
    };
    let mut record = Record::new(id, name, engine);
    record.image = image.reference.clone();
    record.image_id = image.id.to_string();
    record.command.clone_from(&command);
    record.engine_reason = reason;
    record.vm_memory_mib = vm.memory_mib;
    record.vcpus = vm.vcpus;
    record.volumes.clone_from(&args.volume);
    record.auto_remove = args.rm;
    record.tty = args.process.tty;
    record.stop_signal = stop_signal;
    Ok(Prepared {
        image,
        record,
        vm,
        args: command,
        capabilities,
        security,
        probed,
    })
}

/// Tells a person at a terminal what takes long.
fn progress(progress: Progress) {
    if io::stderr().is_terminal() {
        match progress {
            Progress::Waiting { layer } => {
                eprintln!("cloison: another process is unpacking layer {layer}")
            }
            Progress::Unpacked { layer } => eprintln!("cloison: unpacked layer {layer}"),
            _ => {}
        }
    }
}

/// Makes the container on disk, and all of its mounts. What it has made when it fails is gone again.
fn make(home: &Home, args: &Run, mut prepared: Prepared, streams: Streams) -> Result<Monitor> {
    let (container, lock) = Container::create(home, &prepared.record)?;
    let mut furnished = || {
        let dir = container.sandbox().dir().to_owned();
        let source = Source::prepare(home, container.id(), &dir, &args.network)
            .context("cannot connect the container to its network")?;
        prepared.record.network = source.record(&args.network);
        prepared.vm.spare_nics = source.later();
        prepared.vm.awaits_nic = source.is_sure();
        let spec = furnish(&container, args, &prepared, &source)?;
        container.save(&prepared.record)?;
        Ok((source, spec))
    };
    let (source, spec) = match furnished() {
        Ok(furnished) => furnished,
        Err(error) => {
            // The first error is the one to tell.
            let _ = container.erase();
            return Err(error);
        }
    };
    Ok(Monitor {
        container,
        _lock: lock,
        record: prepared.record,
        vm: prepared.vm,
        spec,
        streams,
        profile: None,
        probed: prepared.probed,
        source,
    })
}

fn write_cidfile(file: &Path, id: &Id) -> Result<()> {
    File::create_new(file)
        .and_then(|mut cidfile| write!(cidfile, "{id}"))
        .with_context(|| format!("cannot write the container's ID to {}", file.display()))
}

/// Mounts the root file system and the volumes where the guest will see them, and writes the spec.
fn furnish(
    container: &Container,
    args: &Run,
    prepared: &Prepared,
    source: &Source,
) -> Result<Spec> {
    let mut shared = container.sandbox().share(container.id())?;
    let rootfs = shared.rootfs_on_host();
    let (upper, work) = (
        container.data_dir().join("upper"),
        container.data_dir().join("work"),
    );
    for dir in [&upper, &work] {
        fs::create_dir(dir)
            .with_context(|| format!("cannot create the directory {}", dir.display()))?;
    }
    // The mount goes with the mount namespace that only this container's processes are in.
    let _ = RootFs::mount(&prepared.image, &upper, &work, &rootfs, false)?;
    let hostname = args
        .hostname
        .clone()
        .unwrap_or_else(|| container.id().short().to_owned());
    let etc = Etc::write(container.sandbox().dir(), &hostname, &args.network, source)?;
    let mut binds = Vec::new();
    for (file, destination) in etc.files() {
        // A volume in its place is what the person wants.
        if args.volume.iter().all(|v| v.destination != destination) {
            binds.push((
                shared.add_mount(cloison_sandbox::Source::open(
                    &file,
                    BindOptions::default(),
                )?)?,
                destination,
                false,
            ));
        }
    }
    binds.extend(volumes(&mut shared, args)?);

    let config = &prepared.image.config;
    let user = user_of(
        &rootfs,
        args.process.user.as_deref().or(config.user.as_deref()),
    )?;
    let workdir = args
        .process
        .workdir
        .as_deref()
        .or(config.working_dir.as_deref());
    let workdir = workdir.filter(|dir| !dir.is_empty()).unwrap_or("/");
    make_workdir(&rootfs, workdir)?;
    let mut base = config.env.clone();
    base.push(format!("HOSTNAME={hostname}"));
    let process = ProcessPlan {
        args: prepared.args.clone(),
        env: environment(&base, &args.process, Some(&user.home))?,
        workdir: workdir.to_owned(),
        user: &user,
        terminal: args.process.tty,
        capabilities: &prepared.capabilities,
        ulimits: &args.ulimit,
    };
    let plan = ContainerPlan {
        id: container.id(),
        process: process.into_process()?,
        hostname,
        rootfs: shared.rootfs_in_guest(),
        read_only: args.read_only,
        memory: args.memory,
        cpus: args.cpus,
        security: prepared.security.clone(),
        binds,
        tmpfs: &args.tmpfs,
        init: args.init,
    };
    let spec = plan.into_spec()?;
    container.save_spec(&spec)?;
    if let Some(file) = &args.cidfile {
        write_cidfile(file, container.id())?;
    }
    Ok(spec)
}

fn volumes(shared: &mut Shared, args: &Run) -> Result<Vec<(PathBuf, PathBuf, bool)>> {
    let bind = |volume: &crate::values::Volume| {
        let options = BindOptions {
            recursive: true,
            read_only: volume.read_only,
            ..BindOptions::default()
        };
        let source = cloison_sandbox::Source::open(&volume.source, options);
        let in_guest = source.and_then(|source| shared.add_mount(source));
        let in_guest = in_guest
            .with_context(|| format!("cannot use the volume source {}", volume.source.display()))?;
        Ok((in_guest, volume.destination.clone(), volume.read_only))
    };
    args.volume.iter().map(bind).collect()
}

/// Docker makes a working directory that the image lacks.
fn make_workdir(rootfs: &Path, workdir: &str) -> Result<()> {
    let root = Root::open(rootfs).context("cannot open the container's root file system")?;
    match root.create_dir_all(Path::new(workdir), 0o755, 0, 0) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            bail!("the working directory {workdir} is not a directory in the image")
        }
        Err(e) => Err(e).with_context(|| format!("cannot make the working directory {workdir}")),
    }
}
