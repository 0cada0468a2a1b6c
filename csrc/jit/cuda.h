// The part of CUDA's driver API that launching a kernel takes, declared by hand and opened at run
// time: the extension builds without CUDA and imports on a machine with no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "device/types.h"

namespace deepgemm::jit {

// Names, values and layouts are those of NVIDIA's cuda.h, where they are ABI; only what is used
// here.
enum CUresult : int { CUDA_SUCCESS = 0 };

using CUdevice = int;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUtensorMap = TensorMap;

enum CUdevice_attribute : int {
  CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36,
  CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37,
};

enum CUfunction_attribute : int { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };

enum CUtensorMapDataType : int {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave : int { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle : int {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3,
};
enum CUtensorMapL2promotion : int { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill : int { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

enum CUlaunchAttributeID : int {
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
};
struct CUlaunchAttribute {
  CUlaunchAttributeID id;
  alignas(8) union {
    char pad[64];
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72);

struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned numAttrs;
};

struct Driver {
  CUresult (*cuGetErrorName)(CUresult, const char**);
  CUresult (*cuGetErrorString)(CUresult, const char**);
  CUresult (*cuCtxGetDevice)(CUdevice*);
  CUresult (*cuDeviceGetAttribute)(int*, CUdevice_attribute, CUdevice);
  CUresult (*cuLibraryLoadData)(CUlibrary*, const void* image, int* jit_options, void** jit_values,
                                unsigned jit_count, int* options, void** values, unsigned count);
  CUresult (*cuLibraryGetKernel)(CUkernel*, CUlibrary, const char* name);
  CUresult (*cuKernelSetAttribute)(CUfunction_attribute, int value, CUkernel, CUdevice);
  CUresult (*cuKernelGetFunction)(CUfunction*, CUkernel);
  CUresult (*cuLaunchKernelEx)(const CUlaunchConfig*, CUfunction, void** args, void** extra);
  CUresult (*cuTensorMapEncodeTiled)(CUtensorMap*, CUtensorMapDataType, uint32_t rank,
                                     void* address, const uint64_t* sizes,
                                     const uint64_t* strides_bytes, const uint32_t* box,
                                     const uint32_t* element_strides, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion,
                                     CUtensorMapFloatOOBfill);
};

// Opened at the first call; throws a sentence where there is no driver, or one that is too old.
const Driver& driver();

// The CUDA version that the driver supports (13000 for 13.0); nothing where there is no driver.
std::optional<int> driver_version();

// What device memory moves at most, by its clock and its width; 0 where these are not told.
double memory_gbs(CUdevice device);

// Throws a sentence that names the call and the driver's error, unless the call succeeded.
[[noreturn]] void fail(const char* call, CUresult result);
inline void check(const char* call, CUresult result) {
  if (result != CUDA_SUCCESS) fail(call, result);
}

}  // namespace deepgemm::jit
