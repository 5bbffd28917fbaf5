// A module that holds NVSHMEM's device state and nothing else. It is compiled to relocatable code and linked with the installed
// libnvshmem_device.a when the provider starts, so no binary of ours contains NVSHMEM, and host and device side are of one release.
#include "device_host/nvshmem_types.h"
#include "device_host_transport/nvshmem_common_ibgda.h"

extern __constant__ nvshmemi_device_host_state_t nvshmemi_device_state_d;

// Never launched: its references bring the state into the linked module.
extern "C" __global__ void deepep_hold_nvshmem_state(nvshmemi_ibgda_device_state_t* ibgda, nvshmemi_device_host_state_t* state) {
    *ibgda = nvshmemi_ibgda_device_state_d;
    *state = nvshmemi_device_state_d;
}
