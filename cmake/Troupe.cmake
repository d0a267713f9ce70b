# Build conventions shared by every folder.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  # The sloppiness is what ccache asks for with precompiled headers.
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE_PROGRAM})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

set(TROUPE_SANITIZE "" CACHE STRING "Sanitizers to build with: address,undefined or thread")
if(TROUPE_SANITIZE)
  # CAF 0.17 binds null references in its headers, hence the exception.
  add_compile_options(-fsanitize=${TROUPE_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${TROUPE_SANITIZE})
  if(TROUPE_SANITIZE MATCHES "undefined")
    add_compile_options(-fno-sanitize=null -fno-sanitize-recover=undefined)
  endif()
  if(TROUPE_SANITIZE MATCHES "thread")
    # Asio uses fences, which ThreadSanitizer does not model and GCC warns of.
    add_compile_options(-Wno-tsan)
  endif()
endif()

# Our code compiles without warnings; generated and third-party code is exempt.
add_library(troupe_warnings INTERFACE)
target_compile_options(troupe_warnings INTERFACE
  -Wall -Wextra -Werror -Wno-missing-field-initializers
  # False alarms of GCC 12 in std::string concatenation (GCC bug 105651).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)

add_compile_definitions(TROUPE_VERSION="${PROJECT_VERSION}")

# troupe_folder(NAME PATH [DEPENDS ...] [EXTERNAL ...])
#
# One static library for the folder at PATH, made of every source file in it.
# Its headers are reachable as <troupe/PATH_WITHOUT_src/...> and only for targets that
# link it: the include root holds one link, to this folder alone. That is
# what makes a wrong dependency arrow fail to compile.
function(troupe_folder name path)
  cmake_parse_arguments(arg "" "" "DEPENDS;EXTERNAL;SOURCES" ${ARGN})
  set(source_dir ${PROJECT_SOURCE_DIR}/${path})
  if(NOT arg_SOURCES)
    file(GLOB arg_SOURCES CONFIGURE_DEPENDS ${source_dir}/*.cpp)
  endif()
  string(REGEX REPLACE "^src/" "" public_path ${path})
  set(root ${PROJECT_BINARY_DIR}/include/${name})
  get_filename_component(parent ${root}/troupe/${public_path} DIRECTORY)
  file(MAKE_DIRECTORY ${parent})
  file(CREATE_LINK ${source_dir} ${root}/troupe/${public_path} SYMBOLIC)
  if(arg_SOURCES)
    add_library(troupe_${name} STATIC ${arg_SOURCES})
    target_link_libraries(troupe_${name} PUBLIC ${arg_DEPENDS} ${arg_EXTERNAL})
    target_link_libraries(troupe_${name} PRIVATE troupe_warnings)
    target_include_directories(troupe_${name} PUBLIC ${root})
  else()
    add_library(troupe_${name} INTERFACE)
    target_link_libraries(troupe_${name} INTERFACE ${arg_DEPENDS} ${arg_EXTERNAL})
    target_include_directories(troupe_${name} INTERFACE ${root})
  endif()
  add_library(troupe::${name} ALIAS troupe_${name})
endfunction()

# troupe_test(FOLDER [DEPENDS ...] [LABELS ...] [TIMEOUT seconds])
#
# One Catch2 program of every *_test.cpp in tests/FOLDER, each test case a CTest test.
function(troupe_test folder)
  cmake_parse_arguments(arg "" "TIMEOUT" "DEPENDS;LABELS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/${folder}/*_test.cpp)
  if(NOT sources)
    return()
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 60)
  endif()
  add_executable(${folder}_tests ${sources})
  target_link_libraries(${folder}_tests PRIVATE ${arg_DEPENDS} troupe_catch_main troupe_warnings)
  target_compile_definitions(${folder}_tests PRIVATE
    TROUPE_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
    TROUPE_BINARY_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  set(properties TIMEOUT ${arg_TIMEOUT})
  if(arg_LABELS)
    list(APPEND properties LABELS ${arg_LABELS})
  endif()
  # Tests that start clusters measure pauses and have the machine to themselves.
  if("process" IN_LIST arg_LABELS)
    list(APPEND properties RUN_SERIAL TRUE)
  endif()
  catch_discover_tests(${folder}_tests TEST_PREFIX "${folder}: " PROPERTIES ${properties})
endfunction()
