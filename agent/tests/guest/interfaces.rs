//! Interfaces that the host gives the guest: here the kernel's own dummy device stands for one.

use std::fs;

use cloison_agent_api::agent::{Address, Interface, InterfaceRequest, Neighbour, Route};
use ttrpc::Code;

use crate::agent::{Guest, context, refusal, spec};

/// The device's hardware address.
fn device() -> Vec<u8> {
    let text = fs::read_to_string("/sys/class/net/dummy0/address").unwrap();
    let bytes = text.trim().split(':');
    bytes.map(|b| u8::from_str_radix(b, 16).unwrap()).collect()
}

fn address(address: &[u8], prefix: u32) -> Address {
    let mut message = Address::new();
    message.address = address.to_vec();
    message.prefix = prefix;
    message
}

fn route(destination: &[u8], prefix: u32, gateway: &[u8], scope: u32) -> Route {
    let mut message = Route::new();
    message.destination = destination.to_vec();
    message.prefix = prefix;
    message.gateway = gateway.to_vec();
    message.scope = scope;
    message
}

fn interface(device: &[u8]) -> Interface {
    let mut v6 = [0; 16];
    (v6[0], v6[15]) = (0xfd, 2);
    let mut neighbour = Neighbour::new();
    neighbour.address = vec![10, 9, 0, 1];
    neighbour.mac = vec![2, 0, 0, 0, 0, 9];
    let mut metered = route(&[10, 7, 0, 0], 16, &[10, 9, 0, 1], 0);
    (metered.metric, metered.mtu) = (Some(7), Some(1300));
    let mut interface = Interface::new();
    interface.device = device.to_vec();
    interface.name = "net0".into();
    interface.mac = device.to_vec();
    interface.mtu = 1400;
    interface.addresses = vec![address(&[10, 9, 0, 2], 24), address(&v6, 64)];
    interface.routes = vec![
        route(&[10, 9, 0, 0], 24, &[], 253),
        route(&[0; 4], 0, &[10, 9, 0, 1], 0),
        metered,
    ];
    interface.neighbours = vec![neighbour];
    interface
}

async fn configure(guest: &Guest, interface: &Interface) -> Result<(), (Code, String)> {
    let done = guest.client.configure_interface(context(), interface).await;
    done.map(drop).map_err(refusal)
}

async fn shown(guest: &Guest) -> String {
    let script = "ip addr show net0; ip route; ip neigh; ip -6 route";
    guest.shell(spec(), script).await.1
}

pub async fn an_interface_is_made_what_the_host_says_and_follows_it(guest: Guest) {
    let device = device();
    let mut wanted = interface(&device);
    configure(&guest, &wanted).await.unwrap();
    let said = shown(&guest).await;
    for line in [
        "mtu 1400",
        "inet 10.9.0.2/24 scope global noprefixroute net0",
        "inet6 fd00::2/64 scope global",
        "default via 10.9.0.1 dev net0",
        "10.9.0.0/24 dev net0 scope link",
        "10.7.0.0/16 via 10.9.0.1 dev net0  metric 7",
        "10.9.0.1 dev net0 lladdr 02:00:00:00:00:09",
    ] {
        assert!(said.contains(line), "{line} is not in {said}");
    }
    // The same again changes nothing; then it has other addresses and routes, and no neighbours.
    configure(&guest, &wanted).await.unwrap();
    wanted.mtu = 1500;
    wanted.addresses = vec![address(&[10, 8, 0, 2], 24)];
    wanted.routes = vec![route(&[10, 8, 0, 0], 24, &[], 253)];
    wanted.neighbours.clear();
    configure(&guest, &wanted).await.unwrap();
    let said = shown(&guest).await;
    assert!(
        said.contains("10.8.0.2/24") && said.contains("mtu 1500"),
        "{said}"
    );
    for gone in ["10.9.0", "10.7.0.0", "default", "fd00::2"] {
        assert!(!said.contains(gone), "{gone} is in {said}");
    }
    let mut request = InterfaceRequest::new();
    request.device = device;
    for _ in 0..2 {
        guest
            .client
            .remove_interface(context(), &request)
            .await
            .unwrap();
    }
    let (_, said) = guest.shell(spec(), "ip addr").await;
    assert!(
        said.contains("spare") && !said.contains("10.8.0.2"),
        "{said}"
    );
}

pub async fn an_interface_that_cannot_be_is_refused_with_the_reason(guest: Guest) {
    let nobody = [2, 0, 0, 0, 0, 0xee];
    let (code, why) = configure(&guest, &interface(&nobody)).await.unwrap_err();
    assert_eq!(code, Code::INTERNAL);
    assert!(
        why.contains("net0") && why.contains("02:00:00:00:00:ee"),
        "{why}"
    );
    let mut wrong = interface(&nobody);
    wrong.addresses = vec![address(&[1, 2, 3], 8)];
    let (code, why) = configure(&guest, &wrong).await.unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(why.contains("4 or 16 bytes"), "{why}");
    let mut request = InterfaceRequest::new();
    request.device = vec![1];
    let refused = guest.client.remove_interface(context(), &request).await;
    assert_eq!(
        refused.map_err(refusal).unwrap_err().0,
        Code::INVALID_ARGUMENT
    );
}
