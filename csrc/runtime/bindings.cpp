// Python's view of the host runtime: `deepep._runtime`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "driver.h"
#include "wait.h"

namespace py = pybind11;

namespace deepep {
namespace {

void launch_kernel(uintptr_t function, unsigned grid, unsigned block, unsigned shared_bytes, uintptr_t stream,
            const py::buffer& arguments, unsigned cluster, bool cooperative, bool overlap_previous) {
  driver::LaunchAttribute attributes[3] = {};
  unsigned num_attributes = 0;
  if (cooperative) {
    attributes[num_attributes].id = driver::kLaunchAttributeCooperative;
    attributes[num_attributes++].value.flag = 1;
  }
  if (cluster > 1) {
    attributes[num_attributes].id = driver::kLaunchAttributeClusterDimension;
    attributes[num_attributes++].value.cluster = {cluster, 1, 1};
  }
  if (overlap_previous) {
    attributes[num_attributes].id = driver::kLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes++].value.flag = 1;
  }
  const driver::LaunchConfig config{grid, 1, 1, block, 1, 1, shared_bytes, reinterpret_cast<void*>(stream),
                                    attributes, num_attributes};
  const py::buffer_info view = arguments.request();
  driver::launch(config, reinterpret_cast<void*>(function), view.ptr);
}

py::tuple wait_without_lock(uintptr_t words, size_t num_words, uint32_t epoch, double timeout_s, uintptr_t stop) {
  Waited result;
  bool is_interrupted = false;
  {
    py::gil_scoped_release release;
    result = deepep::wait_for_words(reinterpret_cast<const volatile uint64_t*>(words), num_words, epoch, timeout_s,
                                    reinterpret_cast<const volatile uint64_t*>(stop), [&] {
                                      py::gil_scoped_acquire acquire;
                                      return is_interrupted = PyErr_CheckSignals() != 0;
                                    });
  }
  if (is_interrupted) throw py::error_already_set();
  return py::make_tuple(result.values, result.missing);
}

}  // namespace
}  // namespace deepep

PYBIND11_MODULE(_runtime, module) {
  module.doc() = "Launches and waits of the CUDA backends, without the interpreter's overhead and without its lock.";
  module.def("launch", &deepep::launch_kernel, py::arg("function"), py::arg("grid"), py::arg("block"), py::arg("shared_bytes"),
             py::arg("stream"), py::arg("arguments"), py::arg("cluster") = 1, py::arg("cooperative") = false,
             py::arg("overlap_previous") = false,
             "Start a kernel whose only parameter is a struct, given as any object with the buffer protocol.");
  module.def("wait_for_words", &deepep::wait_without_lock, py::arg("words"), py::arg("num_words"), py::arg("epoch"),
             py::arg("timeout_s"), py::arg("stop") = 0,
             "Wait for {epoch, value} words at an address; returns (values, indices that did not come).");
}
