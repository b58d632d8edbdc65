// A torch built without CUDA has no guard for CUDA devices; tensors that say they are on one need it to be dispatched.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA,
    new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
