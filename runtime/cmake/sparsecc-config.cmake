# Models as build products:
#
#   find_package(sparsecc REQUIRED)      # -Dsparsecc_DIR="$(sparsecc ops path --cmake)"
#   sparsecc_optimize(detector MODEL detector.onnx OUTPUT detector.small.onnx
#                     [TARGET cpu|arm64|cuda] [ARGS --pattern 16x1 --sparsity 0.8 ...] [DEPENDS file...])
#   sparsecc_bundle(device MODEL detector.small.onnx OUTPUT device
#                   MACHINE aarch64-linux|x86_64-linux [ARGS ...] [DEPENDS detector])
#
#   target_link_libraries(program PRIVATE sparsecc::run)
#
# The first makes a target `detector`, part of `all`, that runs `sparsecc optimize`. It runs again when the model, a file
# that an option names (recipe, calibration data, metric, ...) or sparsecc itself has changed, and not otherwise. Paths
# are taken from the current source folder (MODEL of a file that is built: from the build folder, absolute) and OUTPUT
# from the current build folder. ARGS run in the current source folder. The second puts the result and all that a device
# needs into a folder. The third compiles what sparsecc-run is made of into a program: models on an onnxruntime that is
# loaded at run time, arrays in .npy files (backend.h, array.h).
include("${CMAKE_CURRENT_LIST_DIR}/sparsecc-executable.cmake")

if(NOT sparsecc_VERSION)
  set(sparsecc_FOUND FALSE)
  set(sparsecc_NOT_FOUND_MESSAGE
      "the command line of sparsecc is not found or fails (${SPARSECC_EXECUTABLE}): set SPARSECC_EXECUTABLE to it")
  return()
endif()

# Absolute paths of what a function was given, and where its output goes.
macro(_sparsecc_places function)
  foreach(needed MODEL OUTPUT)
    if(NOT _arg_${needed})
      message(FATAL_ERROR "${function}: ${needed} is missing")
    endif()
  endforeach()
  if(_arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "${function}: no argument ${_arg_UNPARSED_ARGUMENTS}; options of the command go after ARGS")
  endif()
  get_filename_component(_model "${_arg_MODEL}" ABSOLUTE)
  get_filename_component(_output "${_arg_OUTPUT}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_BINARY_DIR}")
  get_filename_component(_folder "${_output}" DIRECTORY)
  file(MAKE_DIRECTORY "${_folder}")
endmacro()

function(sparsecc_optimize name)
  cmake_parse_arguments(PARSE_ARGV 1 _arg "" "MODEL;OUTPUT;TARGET" "ARGS;DEPENDS")
  _sparsecc_places(sparsecc_optimize)
  if(_arg_TARGET)
    list(PREPEND _arg_ARGS --target "${_arg_TARGET}")
  endif()
  add_custom_command(
    OUTPUT "${_output}"
    COMMAND "${SPARSECC_EXECUTABLE}" --quiet optimize "${_model}" -o "${_output}" --depfile "${_output}.d" ${_arg_ARGS}
    DEPENDS "${_model}" ${_arg_DEPENDS}
    DEPFILE "${_output}.d"
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    COMMENT "sparsecc optimize ${_arg_OUTPUT}"
    VERBATIM)
  add_custom_target(${name} ALL DEPENDS "${_output}")
  set_target_properties(${name} PROPERTIES SPARSECC_MODEL "${_output}")
endfunction()

function(sparsecc_bundle name)
  cmake_parse_arguments(PARSE_ARGV 1 _arg "" "MODEL;OUTPUT;MACHINE" "ARGS;DEPENDS")
  _sparsecc_places(sparsecc_bundle)
  if(NOT _arg_MACHINE)
    message(FATAL_ERROR "sparsecc_bundle: MACHINE is missing, aarch64-linux or x86_64-linux")
  endif()
  # The manifest stands for the folder: it is there when all of it is.
  add_custom_command(
    OUTPUT "${_output}/manifest.json"
    COMMAND "${SPARSECC_EXECUTABLE}" --quiet bundle "${_model}" -o "${_output}" --target "${_arg_MACHINE}" --force
            --depfile "${_output}.d" ${_arg_ARGS}
    DEPENDS "${_model}" ${_arg_DEPENDS}
    DEPFILE "${_output}.d"
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    COMMENT "sparsecc bundle ${_arg_OUTPUT}"
    VERBATIM)
  add_custom_target(${name} ALL DEPENDS "${_output}/manifest.json")
endfunction()

if(EXISTS "${CMAKE_CURRENT_LIST_DIR}/../csrc/run/backend.h" AND NOT TARGET sparsecc::run)
  get_filename_component(_sparsecc_csrc "${CMAKE_CURRENT_LIST_DIR}/../csrc" REALPATH)
  add_library(sparsecc::run INTERFACE IMPORTED)
  target_sources(sparsecc::run INTERFACE "${_sparsecc_csrc}/run/array.cc" "${_sparsecc_csrc}/run/ort_backend.cc")
  target_include_directories(sparsecc::run INTERFACE "${_sparsecc_csrc}/run" "${_sparsecc_csrc}/ort")
  target_compile_features(sparsecc::run INTERFACE cxx_std_20)
  target_link_libraries(sparsecc::run INTERFACE ${CMAKE_DL_LIBS})
endif()
