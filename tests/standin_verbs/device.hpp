#pragma once
// The one device of a host, with one port.

namespace standin {

constexpr char kDeviceName[] = "standin_0";

}  // namespace standin
