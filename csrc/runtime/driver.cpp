#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace deepep::driver {
namespace {

using LaunchKernelEx = Result (*)(const LaunchConfig*, Function, void** parameters, void** extra);
using GetErrorString = Result (*)(Result, const char** text);

struct Library {
    LaunchKernelEx launch_kernel_ex;
    GetErrorString get_error_string;

    Library() {
        void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) throw std::runtime_error(std::string("no CUDA driver on this machine: ") + dlerror());
        launch_kernel_ex = symbol<LaunchKernelEx>(handle, "cuLaunchKernelEx");
        get_error_string = symbol<GetErrorString>(handle, "cuGetErrorString");
    }

    template <typename Pointer>
    static Pointer symbol(void* handle, const char* name) {
        void* address = dlsym(handle, name);
        if (address == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": update it");
        return reinterpret_cast<Pointer>(address);
    }
};

const Library& library() {
    static const Library loaded;
    return loaded;
}

}  // namespace

void launch(const LaunchConfig& config, Function function, void* argument_struct) {
    void* parameters[] = {argument_struct};
    const Result status = library().launch_kernel_ex(&config, function, parameters, nullptr);
    if (status == 0) return;
    const char* text = nullptr;
    library().get_error_string(status, &text);
    throw std::runtime_error("cuLaunchKernelEx failed: " + std::to_string(status) + " (" + (text ? text : "no text") +
                             ")");
}

}  // namespace deepep::driver
