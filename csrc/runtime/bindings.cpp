// Python's view of the host runtime: `deepep._runtime`.
#include <pybind11/pybind11.h>

#include "driver.h"
#include "wait.h"

namespace py = pybind11;

namespace deepep {
namespace {

void launch_kernel(uintptr_t function, unsigned grid, unsigned block, unsigned smem, uintptr_t stream, uintptr_t args,
                   bool cooperative, bool pdl) {
    driver::LaunchAttribute attributes[2] = {};
    unsigned num_attributes = 0;
    if (cooperative) {
        attributes[num_attributes].id = driver::kLaunchAttributeCooperative;
        attributes[num_attributes++].value.flag = 1;
    }
    if (pdl) {
        attributes[num_attributes].id = driver::kLaunchAttributeProgrammaticStreamSerialization;
        attributes[num_attributes++].value.flag = 1;
    }
    const driver::LaunchConfig config{
        grid, 1, 1, block, 1, 1, smem, reinterpret_cast<void*>(stream), attributes, num_attributes};
    driver::launch(config, reinterpret_cast<void*>(function), reinterpret_cast<void*>(args));
}

bool wait_without_lock(uintptr_t address, uint64_t value, double timeout_s) {
    bool is_interrupted = false;
    bool has_come = false;
    {
        py::gil_scoped_release release;
        has_come = wait_word(reinterpret_cast<const volatile uint64_t*>(address), value, timeout_s, [&] {
            py::gil_scoped_acquire acquire;
            return is_interrupted = PyErr_CheckSignals() != 0;
        });
    }
    if (is_interrupted) throw py::error_already_set();
    return has_come;
}

}  // namespace
}  // namespace deepep

PYBIND11_MODULE(_runtime, module) {
    module.doc() = "Launches and waits of the CUDA backends, without the interpreter's overhead and without its lock.";
    module.def("launch", &deepep::launch_kernel, py::arg("function"), py::arg("grid"), py::arg("block"),
               py::arg("smem"), py::arg("stream"), py::arg("args"), py::arg("cooperative") = false,
               py::arg("pdl") = false, "Start a kernel whose only parameter is the struct at address `args`.");
    module.def("wait_word", &deepep::wait_without_lock, py::arg("address"), py::arg("value"), py::arg("timeout_s"),
               "Wait until the 64-bit word at an address has a value; False when the time is up.");
}
