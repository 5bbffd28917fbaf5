#pragma once
// As much of the driver's interface as hosts use beside symmetric memory.
using CUmodule = struct EmulatedModule*;
using CUfunction = struct EmulatedFunction*;
enum CUresult { CUDA_SUCCESS = 0 };
inline CUresult cuFuncGetModule(CUmodule* module, CUfunction) { return *module = nullptr, CUDA_SUCCESS; }
