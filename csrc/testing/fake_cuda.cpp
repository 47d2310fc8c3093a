// A CUDA runtime without a device, for tests on machines without a GPU: it stands between the launchers and bindings, linked as
// they are, and a function of the test that gets every launch. Never installed.
//
// Tensors are CPU tensors that pass for CUDA ones: the shim functions that tell a tensor's device, enter a device guard, get
// the current stream and register an op are wrapped by the linker (--wrap). Not thread-safe.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Call {
  const char* kernel;  // mangled
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  int64_t shared_granted;  // dynamic shared memory the kernel asked for on this device; -1 where it did not ask
  void* stream;
  int32_t device;
  void** arguments;
};

/// Returns a cudaError_t: what the launch fails with.
using OnLaunch = int (*)(const Call*);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

struct State {
  OnLaunch on_launch = nullptr;
  int32_t device = 0;         // current
  int32_t tensor_device = 0;  // of every tensor, unless `places` has it
  std::map<const void*, int32_t> places;
  std::map<const void*, const char*> kernels;
  std::map<std::pair<const void*, int32_t>, int64_t> shared_granted;
  std::vector<Configuration> configurations;
  cudaError_t error = cudaSuccess;
};

State& state() {  // not a global: kernels register before the globals of this file are made
  static State instance;
  return instance;
}

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) state().error = error;
  return error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  State& now = state();
  const auto kernel = now.kernels.find(function);
  if (kernel == now.kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
  const auto granted = now.shared_granted.find({function, now.device});
  const Call call{kernel->second,
                  {grid.x, grid.y, grid.z},
                  {block.x, block.y, block.z},
                  shared_bytes,
                  granted == now.shared_granted.end() ? -1 : granted->second,
                  stream,
                  now.device,
                  arguments};
  return fail(now.on_launch ? cudaError_t(now.on_launch(&call)) : cudaErrorNoDevice);
}

}  // namespace

// --- what a test sets and sees -----------------------------------------------------------------------------------------------

EXPORT void fake_cuda_begin(OnLaunch on_launch, int32_t tensor_device) {
  State& now = state();
  now.on_launch = on_launch;
  now.tensor_device = tensor_device;
  now.places.clear();
  now.error = cudaSuccess;
}

/// Puts the tensors that start at `data` on another device, -1 for the CPU.
EXPORT void fake_cuda_place(const void* data, int32_t device) { state().places[data] = device; }

EXPORT int32_t fake_cuda_device() { return state().device; }

/// The current stream of a device: an address that is no stream of anybody else.
EXPORT void* fake_cuda_stream(int32_t device) { return reinterpret_cast<void*>(uintptr_t(0x57e40000 + device)); }

// --- the runtime -------------------------------------------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  state().kernels[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  state().configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Configuration last = state().configurations.back();
  state().configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared_bytes, stream);
}

// From CUDA 13 on, kernels are launched through a handle; here it is the function itself.
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* function) {
  *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  return launch(handle, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) return fail(cudaErrorInvalidValue);
  state().shared_granted[{function, state().device}] = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(state().error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    default: return "unknown error";
  }
}

// --- torch's shim: 0 is success
// ------------------------------------------------------------------------------------------------

int32_t aoti_torch_get_data_ptr(void* tensor, void** data);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t __real_aoti_torch_library_init_impl(const char* space, const char* key, const char* file, uint32_t line,
                                            void** library);

int32_t __wrap_aoti_torch_library_init_impl(const char* space, const char*, const char* file, uint32_t line, void** library) {
  return __real_aoti_torch_library_init_impl(space, FAKE_CUDA_KEY, file, line, library);
}

int32_t __wrap_aoti_torch_get_device_index(void* tensor, int32_t* index) {
  void* data = nullptr;
  const int32_t error = aoti_torch_get_data_ptr(tensor, &data);
  const auto place = state().places.find(data);
  *index = place == state().places.end() ? state().tensor_device : place->second;
  return error;
}

int32_t __wrap_aoti_torch_get_device_type(void* tensor, int32_t* type) {
  int32_t index = 0;
  const int32_t error = __wrap_aoti_torch_get_device_index(tensor, &index);
  *type = index < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return error;
}

int32_t __wrap_aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = fake_cuda_stream(device);
  return 0;
}

int32_t __wrap_aoti_torch_create_device_guard(int32_t device, void** guard) {
  *guard = new int32_t(std::exchange(state().device, device));
  return 0;
}

int32_t __wrap_aoti_torch_delete_device_guard(void* guard) {
  state().device = *static_cast<int32_t*>(guard);
  delete static_cast<int32_t*>(guard);
  return 0;
}

}  // extern "C"
