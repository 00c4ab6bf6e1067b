// The Python module itself is empty: importing it runs the registrations at the foot of each kernel file. The build
// gives its name, _C or _C_cuda. Limited API, so that one binary serves every Python from 3.10 on.
#include <Python.h>

#define GRADREP_JOINED(a, b) a##b
#define GRADREP_INIT(name) GRADREP_JOINED(PyInit_, name)
#define GRADREP_QUOTED(name) #name
#define GRADREP_NAME(name) GRADREP_QUOTED(name)

PyMODINIT_FUNC GRADREP_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   GRADREP_NAME(TORCH_EXTENSION_NAME),
                                   "Kernels of gradrep_kernels",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
