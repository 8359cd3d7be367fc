/* A CUDA driver that does nothing: it answers as an H100 would, and counts what is launched.

   Triton's launcher and helpers bind to these names. Nothing executes: outputs keep whatever their memory held. Arguments are
   left out where no caller's result depends on them, which the C calling conventions of x86-64 and AArch64 allow. */

#include <stddef.h>

typedef int Result;
typedef unsigned long long Pointer;

/* Read by stub_driver.py. Atomic: backward passes launch from threads of their own. */
static long launches;

long focusdpo_stub_launches(void) { return __atomic_load_n(&launches, __ATOMIC_SEQ_CST); }

static Result count_launch(void) {
  __atomic_add_fetch(&launches, 1, __ATOMIC_SEQ_CST);
  return 0;
}

Result cuLaunchKernel(void) { return count_launch(); }
Result cuLaunchKernelEx(void) { return count_launch(); }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 10: *value = 32; break;      /* warp size */
    case 13: *value = 1980000; break; /* clock, kHz */
    case 16: *value = 132; break;     /* multiprocessors */
    case 36: *value = 2619000; break; /* memory clock, kHz */
    case 37: *value = 5120; break;    /* memory bus, bits */
    case 75: *value = 9; break;       /* compute capability, major */
    case 81: *value = 233472; break;  /* shared memory of a multiprocessor, bytes */
    case 82: *value = 65536; break;   /* registers of a multiprocessor */
    case 97: *value = 232448; break;  /* shared memory of a block by opt-in, bytes */
    default: *value = 0;
  }
  return 0;
}

/* Attribute 0 is the most threads of a block that the function may be launched with. */
Result cuFuncGetAttribute(int *value, int attribute) {
  *value = attribute == 0 ? 1024 : 0;
  return 0;
}

/* The device address of a pointer: itself. */
Result cuPointerGetAttribute(void *value, int attribute, Pointer pointer) {
  (void)attribute;
  *(Pointer *)value = pointer;
  return 0;
}
Result cuPointerGetAttributes(void) { return 0; }

/* Handles only have to differ from NULL. */
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuDevicePrimaryCtxRetain(void **context) { *context = (void *)1; return 0; }
Result cuModuleGetFunction(void **function) { *function = (void *)2; return 0; }
Result cuModuleLoadData(void **module) { *module = (void *)3; return 0; }
Result cuModuleLoadDataEx(void **module) { *module = (void *)3; return 0; }

Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuCtxGetLimit(size_t *value) { *value = 0; return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters) { *clusters = 1; return 0; }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 1; return 0; }
Result cuGetErrorString(int error, const char **text) { (void)error; *text = "stub driver"; return 0; }
Result cuGetErrorName(int error, const char **text) { (void)error; *text = "stub driver"; return 0; }

Result cuInit(void) { return 0; }
Result cuCtxSetCurrent(void) { return 0; }
Result cuCtxSetLimit(void) { return 0; }
Result cuFuncSetAttribute(void) { return 0; }
Result cuFuncSetCacheConfig(void) { return 0; }
Result cuModuleUnload(void) { return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }

/* The CUDA runtime in a CUDA build of PyTorch asks for its functions by name; with none of them it stays without a device. */
Result cuGetProcAddress_v2(const char *name, void **function) {
  (void)name;
  *function = NULL;
  return 500; /* CUDA_ERROR_NOT_FOUND */
}
