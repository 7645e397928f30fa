// Preloaded (LD_PRELOAD): the autograd engine then knows of no accelerator, and asks no driver for contexts and streams.
#include <cstdint>
#include <optional>
namespace c10 { enum class DeviceType : int8_t { CPU = 0 }; }
namespace at { namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; }
}}
