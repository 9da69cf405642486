//! What is left, whenever it ends.

use super::*;
use crate::{Error, Result};

/// Lets `steps` steps pass and stops, as a killed process would.
fn fuse(mut steps: usize) -> impl FnMut() -> Result<()> + Send {
    move || {
        steps = steps
            .checked_sub(1)
            .ok_or(Error::NoInterface("killed".to_owned()))?;
        Ok(())
    }
}

/// A sandbox that has something of everything.
fn wanted(world: &World, id: &str) -> Attachment {
    Attachment {
        publish: vec![
            "8080-8082:80-82".parse().unwrap(),
            "127.0.0.1:53:53/udp".parse().unwrap(),
        ],
        egress: "allow=192.0.2.1:80,dns=localhost".parse().ok(),
        ..world.wanted(id)
    }
}

#[tokio::test]
async fn a_sandbox_leaves_nothing_behind() {
    let world = World::new();
    let before = world.traces();
    let attached = world.networks.attach(&wanted(&world, "a")).await.unwrap();
    assert_ne!(world.traces(), before);
    drop(attached);
    world.networks.detach("a").await.unwrap();
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
    world.networks.detach("a").await.unwrap();
    world.networks.detach("nobody").await.unwrap();
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn a_bridge_stays_with_its_network_until_it_is_cleared_away_or_the_network_removed() {
    let world = World::new();
    let before = world.traces();
    drop(world.attach("c").await);
    world.networks.detach("c").await.unwrap();
    let bare = world.traces();
    assert!(bare.contains("cloison0"), "{bare}");
    let a = world.networks.attach(&wanted(&world, "a")).await.unwrap();
    let with_a = world.traces();
    let b = world.attach("b").await;
    drop(b);
    world.networks.detach("b").await.unwrap();
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &with_a, "while one is there");
    drop(a);
    world.networks.detach("a").await.unwrap();
    assert_same(&world.traces(), &bare, "when none is there");
    let other = network("other", "10.3.0.0/24");
    world.networks.create(&other).await.unwrap();
    let on_other = Attachment {
        network: "other".to_owned(),
        ..world.wanted("d")
    };
    drop(world.networks.attach(&on_other).await.unwrap());
    world.networks.detach("d").await.unwrap();
    world.networks.remove_network("other").await.unwrap();
    assert_same(&world.traces(), &bare, "without the other network");
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn whichever_step_of_attaching_was_the_last_nothing_is_left() {
    let world = World::new();
    let before = world.traces();
    let mut steps = 0;
    loop {
        let attached = world
            .networks
            .attach_until(&wanted(&world, "a"), &mut fuse(steps))
            .await;
        let complete = attached.is_ok();
        drop(attached);
        assert_ne!(world.traces(), before, "after {steps} steps");
        world.networks.detach("a").await.unwrap();
        world.networks.clear().await.unwrap();
        assert_same(&world.traces(), &before, &format!("after {steps} steps"));
        if complete {
            break;
        }
        steps += 1;
    }
    assert_eq!(steps, 4);
}

#[tokio::test]
async fn whichever_step_of_detaching_was_the_last_the_next_attempt_ends_it() {
    let world = World::new();
    let before = world.traces();
    let mut steps = 0;
    loop {
        drop(world.networks.attach(&wanted(&world, "a")).await.unwrap());
        let detached = world.networks.detach_until("a", &mut fuse(steps));
        let complete = detached.is_ok();
        // Another one that comes meanwhile is not in its way, nor it in the other's.
        let other = world.attach("other").await;
        assert!(crate::testing::pings(&other.namespace, "192.0.2.1"));
        world.networks.detach("a").await.unwrap();
        drop(other);
        world.networks.detach("other").await.unwrap();
        world.networks.clear().await.unwrap();
        assert_same(&world.traces(), &before, &format!("after {steps} steps"));
        if complete {
            break;
        }
        steps += 1;
    }
    assert_eq!(steps, 3);
}

#[tokio::test]
async fn an_attachment_that_fails_half_way_leaves_nothing() {
    let world = World::new();
    world
        .networks
        .create(&network("gone", "10.3.0.0/24"))
        .await
        .unwrap();
    let before = world.traces();
    let wanted = Attachment {
        network: "gone".to_owned(),
        ..world.wanted("a")
    };
    let lease = world.networks.lease(&wanted).await.unwrap();
    // Somebody else's interface has the name that the bridge should have, and cannot be one.
    let bridge = lease.network.bridge();
    command(&world.host, &format!("ip link add {bridge} type veth")).unwrap();
    world.networks.connect(lease).await.unwrap_err();
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn sandboxes_whose_directory_is_gone_are_pruned_and_no_others() {
    let world = World::new();
    let before = world.traces();
    for id in ["a", "b"] {
        drop(world.attach(id).await);
    }
    fs::remove_dir_all(world.home("a")).unwrap();
    assert_eq!(world.networks.prune().await.unwrap(), ["a"]);
    let inspection = world.networks.inspect(Networks::DEFAULT).unwrap();
    assert_eq!(inspection.sandboxes.keys().collect::<Vec<_>>(), ["b"]);
    fs::remove_dir_all(world.home("b")).unwrap();
    assert_eq!(world.networks.prune().await.unwrap(), ["b"]);
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn the_addresses_of_sandboxes_that_are_gone_are_given_out_again() {
    let world = World::new();
    world
        .networks
        .create(&network("tiny", "10.3.0.0/30"))
        .await
        .unwrap();
    let on_tiny = |id| Attachment {
        network: "tiny".to_owned(),
        ..world.wanted(id)
    };
    drop(world.networks.attach(&on_tiny("a")).await.unwrap());
    let error = world.networks.attach(&on_tiny("b")).await.unwrap_err();
    assert!(matches!(error, Error::Exhausted(_)), "{error}");
    fs::remove_dir_all(world.home("a")).unwrap();
    let b = world.attach_as(&on_tiny("b")).await.unwrap();
    assert_eq!(ipv4(&b), "10.3.0.2");
}

#[tokio::test]
async fn a_network_is_created_listed_inspected_and_removed() {
    let world = World::new();
    let before = world.traces();
    let created = world
        .networks
        .create(&network("a", "10.3.0.0/24"))
        .await
        .unwrap();
    let error = world
        .networks
        .create(&network("a", "10.4.0.0/24"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NetworkExists(_)), "{error}");
    let error = world
        .networks
        .create(&network("b", "192.0.2.0/25"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("through uplink"), "{error}");
    assert_eq!(
        world.networks.list().unwrap(),
        std::slice::from_ref(&created)
    );
    let wanted = Attachment {
        network: "a".to_owned(),
        ..world.wanted("web")
    };
    drop(world.networks.attach(&wanted).await.unwrap());
    let inspection = world.networks.inspect("a").unwrap();
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!(json["subnet"], "10.3.0.0/24");
    assert_eq!(json["sandboxes"]["web"]["ipv4"], "10.3.0.2");
    let error = world.networks.remove_network("a").await.unwrap_err();
    assert!(error.to_string().contains("in use by web"), "{error}");
    world.networks.detach("web").await.unwrap();
    world.networks.remove_network("a").await.unwrap();
    let error = world.networks.remove_network("a").await.unwrap_err();
    assert!(matches!(error, Error::NoNetwork(_)), "{error}");
    assert!(world.networks.list().unwrap().is_empty());
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn a_damaged_file_is_named() {
    let world = World::new();
    let file = world.dir.path().join("data/networks.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "{").unwrap();
    let error = world.networks.list().unwrap_err().to_string();
    assert!(error.contains("networks.json is damaged"), "{error}");
}

#[tokio::test]
async fn two_hundred_sandboxes_come_and_go_and_leave_nothing() {
    let world = World::new();
    let before = world.traces();
    let mut attached = Vec::new();
    let begin = std::time::Instant::now();
    for number in 0..200 {
        attached.push(
            world
                .publish(&format!("s{number}"), &[&format!("{}:80", 2000 + number)])
                .await,
        );
    }
    let came = begin.elapsed();
    let addresses: std::collections::BTreeSet<_> =
        attached.iter().map(|a| a.addresses.ipv4).collect();
    assert_eq!(addresses.len(), 200);
    for one in [&attached[0], &attached[199]] {
        assert!(crate::testing::pings(&one.namespace, "192.0.2.1"));
    }
    drop(attached);
    for number in 0..200 {
        world.networks.detach(&format!("s{number}")).await.unwrap();
    }
    world.networks.clear().await.unwrap();
    println!(
        "200 came in {came:?} and all was over after {:?}",
        begin.elapsed()
    );
    assert_same(&world.traces(), &before, "at the end");
}

#[tokio::test]
async fn sandboxes_that_come_and_go_at_once_do_not_disturb_each_other() {
    let world = World::new();
    let before = world.traces();
    let one = |number: usize| {
        let (networks, wanted) = (world.networks.clone(), world.wanted(&format!("s{number}")));
        tokio::spawn(async move {
            for _ in 0..4 {
                let attached = Sandbox::new(networks.attach(&wanted).await.unwrap());
                assert!(
                    tokio::task::spawn_blocking(move || crate::testing::pings(
                        &attached.namespace,
                        "192.0.2.1"
                    ))
                    .await
                    .unwrap()
                );
                networks.detach(&wanted.id).await.unwrap();
            }
        })
    };
    let all: Vec<_> = (0..4).map(one).collect();
    for task in all {
        task.await.unwrap();
    }
    world.networks.clear().await.unwrap();
    assert_same(&world.traces(), &before, "at the end");
}
