#pragma once
#include <stdexcept>
#include <string>

namespace deepep {

// Base of everything that the native code throws; the bindings map each class to a Python class of the same name.
struct NativeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The CUDA driver or runtime refused something; the text says what was tried and what it answered.
struct DriverError : NativeError {
    using NativeError::NativeError;
};

// An argument that the kernels cannot take; the text says what was given and what is accepted.
struct ArgumentError : NativeError {
    using NativeError::NativeError;
};

}  // namespace deepep
